"""Images written as WebDataset shards with their index and classes.

Every image is decoded once; what cannot be is left out and listed. The same images and options give
the same bytes. A killed or stopped job resumes when it is started again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from rcmae.data.jpeg import check_adds_restarts
from rcmae.data.members.kinds import MemberKind
from rcmae.data.members.maps import decode_map, encode_map, no_label
from rcmae.data.members.registry import kinds, register
from rcmae.data.packing.encoding import AS_THEY_ARE, Encoding, Packed, encoded
from rcmae.data.packing.found import NO_TARGETS, Found, Labelling, Other, Source, Targets
from rcmae.data.packing.indexing import refresh
from rcmae.data.packing.inputs import find_images, held_out, ordered
from rcmae.data.packing.layouts import RECODED
from rcmae.data.packing.members import registered
from rcmae.data.tars import suffix_of
from rcmae.data.transforms import BadImage
from rcmae.data.workers import fork_server, mapped
from rcmae.errors import Refused, counted
from rcmae.files import aside, json_lines, leaving_nothing, write_aside

HELD_OUT = "val"  # what the names of shards of held-out images begin with
_NAME = re.compile(r"\w[\w.-]*")  # no way out of a folder, and no pattern of names
_NAMED = 5  # of many files that a report is about


@dataclass(frozen=True)
class PackingOptions:
    """How images become shards."""

    name: str = "train"  # what the shards' names begin with
    samples: int = 1000  # at most so many in a shard; all have equally many, to one
    images: Encoding = AS_THEY_ARE
    # names in the order of the labels; None: the class folders' in alphabetical order
    classes: Sequence[str] | None = None
    label: str | None = None  # column of labels of a list or Parquet file; "none": it has none
    unlabelled: bool = False  # some images may have a label and others none
    jobs: int = 1  # processes
    overwrite: bool = False  # replace shards of this name
    progress: bool = False  # show a bar on standard error
    targets: Targets = NO_TARGETS  # maps and annotations, where they lie apart from the images


class Rejected(NamedTuple):
    """An image that was left out."""

    path: str
    reason: str


class Written(NamedTuple):
    """A shard that was written."""

    path: str
    samples: int
    rejected: list[Rejected]
    restarts: dict[str, int]  # what became of restart markers -> images; empty: none are asked for


class Report(NamedTuple):
    """What `make_shards` made."""

    shards: list[str]
    samples: int
    bytes: int
    classes: list[str]  # empty: no labels
    rejected: list[Rejected]
    other_files: int  # files that no image suffix names: not looked at
    such_as: list[str]  # a few of them
    kept: int  # shards that a job before had written
    notes: list[str]  # what was taken for a label, and what was passed over
    restarts: dict[str, int]  # what became of restart markers -> images; empty: none are asked for


class Task(NamedTuple):
    """A shard to write."""

    path: str
    sources: Sequence[Source]


def make_shards(
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    options: PackingOptions,
    *,
    hold_out: float | None = None,
) -> Report:
    """Write images as shards with their index and classes.

    Args:
        images: a folder of class folders, or of images; a list; Parquet files; tars. Or several of
            one kind.
        out: folder of the shards; made where it is not there.
        options: how.
        hold_out: share of the images that go into shards of another name, HELD_OUT, with the same
            classes; drawn by their names.

    Raises:
        Refused: the folder holds no images, or images beside class folders, or folders of no
            known class; OUT has shards of this name or other classes; all images of a shard are
            unreadable; restart markers are asked for and nothing here adds them.
    """
    inputs = [str(images)] if isinstance(images, str | Path) else [str(one) for one in images]
    out = Path(out)
    if not _NAME.fullmatch(options.name):
        raise Refused(
            f"name={options.name!r}: what shards' names begin with is letters, digits, dots, "
            "dashes and underscores, such as train"
        )
    if options.images.restart_markers:
        check_adds_restarts()
    spool = out / f".{options.name}.spool"
    with leaving_nothing(spool, Refused):
        return _made(inputs, out, spool, options, hold_out)


def _made(
    inputs: Sequence[str],
    out: Path,
    spool: Path,
    options: PackingOptions,
    hold_out: float | None,
) -> Report:
    how = Labelling(options.label, options.unlabelled, options.classes is not None)
    found = find_images(inputs, spool, how, options.targets)
    sources, labels = ordered(found.images, options.classes, " ".join(inputs))
    if not labels:  # of images; else the classes may be those of their maps
        labels = list(options.classes or found.classes or ())
        sources = [_of_classes(source, len(labels)) for source in sources]
    parts = {options.name: sources}
    if hold_out is not None:
        parts, found = _split(sources, found, options.name, hold_out, " ".join(inputs))
    tasks = [task for name, part in parts.items() for task in _tasks(part, out, name, options)]
    told = _told(sources, labels, options)
    if hold_out is not None:
        told["hold-out"] = hold_out
    job = Job(out / f".{options.name}.progress", told)
    old = []
    for name in parts:
        theirs = sorted(out.glob(f"{name}-*.tar"))
        old += theirs
        if theirs and not options.overwrite and job.done is None:
            raise Refused(_is_taken(out, theirs, name, job.unlike))
    files = dict(found.files)
    if labels:
        files["classes.txt"] = "".join(f"{label}\n" for label in labels).encode()
    for name, content in files.items():
        if not options.overwrite and _differs(out / name, content):
            way = (
                "; pass it as --classes, or" if name == "classes.txt" else "; give another OUT, or"
            )
            raise Refused(f"{out / name} names other classes{way} --overwrite it")

    out.mkdir(parents=True, exist_ok=True)
    for name in parts:
        for torn in out.glob(f".{name}-*.tar.*"):
            torn.unlink()  # of a job that was killed
    before = {path: each for path, each in (job.done or {}).items() if os.path.isfile(path)}
    done = _write_all(tasks, before, job, options)
    paths = [task.path for task in tasks]
    for path in {*map(str, old)} - set(paths):
        Path(path).unlink()
    for name, content in files.items():
        write_aside(out / name, content)
    refresh(out, paths, rebuild=True, jobs=options.jobs)
    job.end()
    spool.unlink(missing_ok=True)
    kept = sum(path in before for path in paths)
    return _report([done[path] for path in paths], labels, found, kept)


def _split(
    sources: Sequence[Source], found: Found, name: str, share: float, what: str
) -> tuple[dict[str, list[Source]], Found]:
    """What goes into shards of each name, in its order, and what was found with a note of it.

    Raises:
        Refused: both names are the same, or one would have no image.
    """
    if name == HELD_OUT:
        raise Refused(f"--hold-out makes shards named {HELD_OUT}; give the others another --name")
    held = held_out(found.images, share, what)
    parts: dict[str, list[Source]] = {name: [], HELD_OUT: []}
    for source in sources:
        parts[HELD_OUT if (source.path, source.offset) in held else name].append(source)
    note = (
        f"{counted(len(held), 'image')} held out, in {HELD_OUT}-*.tar; the others in {name}-*.tar"
    )
    return parts, found._replace(notes=[*found.notes, note])


def _of_classes(source: Source, count: int) -> Source:
    """The image with a map of so many classes; 0: nobody says how many."""
    others = tuple(other._replace(classes=count) for other in source.others)
    return source._replace(others=others)


def _tasks(sources: Sequence[Source], out: Path, name: str, options: PackingOptions) -> list[Task]:
    count = -(-len(sources) // options.samples)
    cuts = [len(sources) * shard // count for shard in range(count + 1)]
    tasks = []
    for shard in range(count):
        path = str(out / f"{name}-{shard:06d}.tar")
        tasks.append(Task(path, sources[cuts[shard] : cuts[shard + 1]]))
    return tasks


def _told(
    sources: Sequence[Source], labels: Sequence[str], options: PackingOptions
) -> dict[str, Any]:
    """What decides the bytes of a job's shards."""
    return {
        "images": _digest(sources),
        "classes": _digest(labels),
        "samples": options.samples,
        "size": options.images.size,
        "quality": options.images.quality,
        "min-size": options.images.min_size,
        **({"restart-markers": True} if options.images.restart_markers else {}),
    }


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _is_taken(out: Path, old: Sequence[Path], name: str, unlike: str) -> str:
    unfinished = ""
    if unlike:
        unfinished = f" of an unfinished job, {unlike}; that job's command resumes it"
    return (
        f"{out} has {counted(len(old), 'shard')} named {name}-*.tar{unfinished}; take another "
        "--name, or --overwrite them"
    )


def _differs(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() != content


def _write_all(
    tasks: Sequence[Task], before: dict[str, Written], job: Job, options: PackingOptions
) -> dict[str, Written]:
    """Path -> what was written, of all shards, those of a job before too."""
    done = dict(before)
    missing = [task for task in tasks if task.path not in done]
    write = partial(write_shard, images=options.images, added=registered())
    shown = track(
        _each(write, missing, options.jobs),
        "writing shards",
        total=len(missing),
        console=Console(stderr=True),
        disable=not options.progress,
    )
    job.begin(done.values())
    try:
        for written in shown:
            job.note(written)
            done[written.path] = written
    except Refused:
        if not done:
            job.end()  # nothing to go on with
        raise
    return done


def _each(write: partial[Written], tasks: Iterable[Task], jobs: int) -> Iterator[Written]:
    if jobs <= 1:
        yield from map(write, tasks)
        return
    yield from mapped(write, tasks, jobs, fork_server("torch"), partial(torch.set_num_threads, 1))


def _report(written: Sequence[Written], labels: list[str], found: Found, kept: int) -> Report:
    paths = [shard.path for shard in written]
    rejected = [Rejected(name, "it is named, and not there") for name in found.gone]
    samples = 0
    restarts: Counter[str] = Counter()
    for shard in written:
        restarts.update(shard.restarts)
        rejected += shard.rejected
        samples += shard.samples
    return Report(
        shards=paths,
        samples=samples,
        bytes=sum(map(os.path.getsize, paths)),
        classes=labels,
        rejected=rejected,
        other_files=len(found.others),
        such_as=sorted(found.others)[:_NAMED],
        kept=kept,
        notes=list(found.notes),
        restarts=dict(restarts),
    )


class Job:
    """What a job has written so far, in a file beside the shards: started again with the same
    input, it resumes.
    """

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        self._path = path
        self._what = what
        # of a job before that was to do the same; None: there was none
        self.done: dict[str, Written] | None = None
        self.unlike = ""  # how a job before that did not end differs from this one
        lines = json_lines(path)
        before = next(lines, None)
        if before == what:
            self.done = {}
            for line in lines:
                rejected = [Rejected(*reject) for reject in line["rejected"]]
                restarts = line.get("restarts", {})
                self.done[line["path"]] = Written(line["path"], line["samples"], rejected, restarts)
        elif before is not None:
            self.unlike = ", ".join(
                _unlike(key, before.get(key), what.get(key))
                for key in before | what
                if before.get(key) != what.get(key)
            )

    def begin(self, done: Iterable[Written]) -> None:
        """Say what the job is, and what is done of it."""
        lines = [self._what, *(written._asdict() for written in done)]
        write_aside(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def note(self, written: Written) -> None:
        """Say that a shard more is there."""
        with self._path.open("a") as file:
            file.write(json.dumps(written._asdict()) + "\n")

    def end(self) -> None:
        """Say that all is there."""
        self._path.unlink(missing_ok=True)


def _unlike(key: str, before: Any, now: Any) -> str:
    if key in ("images", "classes"):
        return f"with other {key}"
    shown = {None: f"no --{key}", True: f"--{key}"}
    return " instead of ".join(
        shown[value] if value is None or value is True else f"--{key}={value}"
        for value in (before, now)
    )


# ---------------------------------------------------------------------------------------- a shard


def write_shard(
    task: Task,
    images: Encoding = AS_THEY_ARE,
    added: Sequence[MemberKind] = (),
) -> Written:
    """Write a tar of the images that can be decoded. It is there complete or not at all.

    `added`: kinds of members that were registered, for another process."""
    for kind in added:
        register(kind)
    count = 0
    rejected: list[Rejected] = []
    restarts: Counter[str] = Counter()
    with (
        aside(Path(task.path)) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for source in task.sources:
            try:
                image = encoded(source, images)
                others = [
                    (f"{suffix_of(other.kind)}", member_of(other, image)) for other in source.others
                ]
            except (BadImage, OSError) as error:
                rejected.append(Rejected(source.name or source.path, str(error)))
                continue
            add(tar, f"{source.key}.{image.suffix}", image.data)
            if image.restarts:
                restarts[image.restarts] += 1
            for suffix, data in others:
                add(tar, f"{source.key}.{suffix}", data)
            if source.label is not None:
                add(tar, f"{source.key}.cls", str(source.label).encode())
            count += 1
        if not count:
            raise Refused(
                f"none of the {len(task.sources)} images of {os.path.basename(task.path)} can be "
                f"read, such as {rejected[0].path}: {rejected[0].reason}"
            )
    return Written(task.path, count, rejected, dict(restarts))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member whose owner, group and time are 0, so that equal data give equal tars."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def member_of(other: Other, image: Packed) -> bytes:
    """A map or an annotation as it goes into a tar beside its image. Raises BadImage, OSError."""
    data = other.read()
    if other.kind == "map":
        numbers = decode_map(data, image.old)
        if other.recode:
            if numbers.dtype != np.uint8:
                raise BadImage(f"its map has 16 bits a pixel; that of {other.recode} has 8")
            data = encode_map(numbers := RECODED[other.recode][numbers])
        _refuse_beyond(numbers, other.classes)
    else:
        kinds()[other.kind].verify(data, image.old, None)
    return (
        data if image.new == image.old else kinds()[other.kind].resized(data, image.old, image.new)
    )


def _refuse_beyond(numbers: NDArray[np.unsignedinteger[Any]], classes: int) -> None:
    """Raise BadImage where a map has numbers beyond its classes, if those are known."""
    there = np.unique(numbers)
    beyond = [each for each in there.tolist() if each >= classes and each != no_label(numbers)]
    if classes and beyond:
        shown = ", ".join(map(str, beyond[:_NAMED]))
        raise BadImage(f"its map has numbers beyond the {classes} classes: {shown}")
