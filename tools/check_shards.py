#!/usr/bin/env python3
"""Look at every byte of a shard set: what is in it, what is wrong with it, and a clean copy of it.

    python tools/check_shards.py verify PATTERN [PATTERN ...] [--picture FILE.png] [--json]
    python tools/check_shards.py repair PATTERN [PATTERN ...] --out FOLDER [--jobs N] [--json]
    python tools/check_shards.py report PATTERN [PATTERN ...] [--json]
    python tools/check_shards.py report --ledger RUN [--json]

`verify` reads each tar to its end, compares it with the index beside it (samples, and SHA-256 where
that has it), decodes each image strictly, looks for keys that are there twice, and counts classes
and sizes (--picture draws the sizes). It names any flaw that a decoder warns of, also where
training would read the image with a smear in it. What it cannot see is damage that leaves a valid
image: other colours in a JPEG, other pixels in a file without a checksum. `repair` writes what can
be read into FOLDER under the same names, with an index: images without a flaw, the first of each
key, and of a tar that is cut short what comes before the cut. `report` tells what the index says,
without reading images; with --ledger, which samples a run (its folder, or its events.jsonl) could
not read, and what took their place. Patterns are those of data.shards. Nothing is ever unpacked, so
no name in a tar can lead anywhere. Exit status: 0 all is well; 1 something is wrong, and told; 2
unusable input; 130 stopped with Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track

from rcmae.data import sources
from rcmae.data.index import ShardIndex
from rcmae.data.patterns import expand
from rcmae.data.tars import NO_LABEL, Shard, groups, image_suffix
from rcmae.data.transforms import BadImage, channels_of, decode
from rcmae.data.workers import fork_server, mapped
from rcmae.errors import Refused
from rcmae.files import aside

# pixels: classes of sizes
SIDES = (32, 64, 96, 128, 160, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
_SHOWN = 20  # of a list, for people


class Rejected(NamedTuple):
    """A sample that should not be trained on."""

    key: str
    offset: int  # bytes from the start of the tar; -1: of the tar as a whole
    reason: str


class Checked(NamedTuple):
    """What reading a shard to its end gave."""

    path: str
    bytes: int
    sha256: str
    samples: int  # good ones
    rejected: list[Rejected]
    classes: dict[int, int]  # label -> samples
    sides: dict[int, int]  # shorter side in pixels -> samples
    channels: dict[int, int]  # of an image -> samples
    keys: list[str]  # of the good ones
    offsets: list[int]  # of the good ones


class Sample(NamedTuple):
    """A sample of an open tar that decodes."""

    key: str
    members: dict[str, bytes]  # suffix -> content
    label: int
    side: int
    channels: int
    offset: int  # of its image


def samples_of(file: BinaryIO, reject: Callable[[Rejected], None]) -> Iterator[Sample]:
    """The samples of an open tar whose images decode.

    All others go to `reject`, also what breaks the tar off.
    """
    seen: set[str] = set()
    key = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in groups(tar):
                suffix = image_suffix(members)
                if suffix is None:
                    reject(
                        Rejected(key, next(iter(members.values())).offset_data, "it has no image")
                    )
                    continue
                at = members[suffix].offset_data
                try:
                    content = {name: _content(file, member) for name, member in members.items()}
                    pixels = decode(content[suffix], channels_of(content[suffix]), strict=True)
                except BadImage as error:
                    reject(Rejected(key, at, str(error)))
                    continue
                if key in seen:
                    reject(Rejected(key, at, "its key is there before in this shard"))
                    continue
                seen.add(key)
                try:
                    label = int(content.get("cls", b""))
                except ValueError:
                    label = NO_LABEL
                yield Sample(key, content, label, min(pixels.shape[:2]), pixels.shape[2], at)
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                reject(Rejected("", -1, "the tar has no end mark: it is cut short"))
            elif key is None:
                reject(Rejected("", -1, "the tar holds no files"))
    except (tarfile.TarError, OSError) as error:
        reject(Rejected("", -1, f"the tar breaks off: {error}"))


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    data = os.pread(file.fileno(), member.size, member.offset_data)
    if len(data) < member.size:
        raise BadImage(f"only {len(data)} of the {member.size} bytes of {member.name} are there")
    return data


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """(an open file with a shard's bytes, their SHA-256)."""
    if sources.is_remote(path):
        with sources.fetched(path) as found:
            yield found
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        yield file, digest


def check(path: str, out: Path | None = None) -> Checked:
    """Read a shard to its end; with `out`, write its good samples there under its name."""
    rejected: list[Rejected] = []
    good: list[Sample] = []
    with opened(path) as (file, digest), contextlib.ExitStack() as stack:
        tar = None
        if out is not None:
            written = stack.enter_context(aside(out / sources.basename(path)))
            tar = stack.enter_context(
                tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT)
            )
        for sample in samples_of(file, rejected.append):
            if tar is not None:
                for suffix, data in sample.members.items():
                    # owner, group and time are 0
                    member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            good.append(sample._replace(members={}))
        size = os.fstat(file.fileno()).st_size
    return Checked(
        path=path,
        bytes=size,
        sha256=digest,
        samples=len(good),
        rejected=rejected,
        classes=dict(Counter(sample.label for sample in good)),
        sides=dict(Counter(sample.side for sample in good)),
        channels=dict(Counter(sample.channels for sample in good)),
        keys=[sample.key for sample in good],
        offsets=[sample.offset for sample in good],
    )


def check_all(paths: Sequence[str], jobs: int, out: Path | None = None) -> Iterator[Checked]:
    """Each shard's, in their order."""
    one = partial(check, out=out)
    if jobs <= 1 or len(paths) <= 1:
        yield from map(one, paths)
        return
    yield from mapped(one, paths, jobs, fork_server("torch"), partial(torch.set_num_threads, 1))


def indexed(paths: Sequence[str]) -> dict[str, Shard]:
    """Path -> what the indexes beside the shards say of it."""
    found: dict[str, Shard] = {}
    for folder in dict.fromkeys(
        sources.folder_of(path) for path in paths if not sources.is_remote(path)
    ):
        with contextlib.suppress(ValueError):
            found |= {
                sources.identity(shard.path): shard for shard in ShardIndex.load(folder).shards
            }
    return {
        path: found[sources.identity(path)] for path in paths if sources.identity(path) in found
    }


def unlike_index(found: Checked, known: Shard) -> Iterator[str]:
    """In what a shard is not the one that was indexed."""
    if known.sha256 and known.sha256 != found.sha256:
        yield "its bytes are not those that were indexed"
    offsets, good = set(known.rows["offset"].tolist()), set(found.offsets)
    gone = len(offsets - good - {reject.offset for reject in found.rejected})
    if gone or good - offsets:
        yield (
            f"its index names {len(offsets)} samples: {gone} of them were not found, and "
            f"{len(good - offsets)} were "
            "that it does not name; get the tar anew, or run tools/index_shards.py --rebuild on it"
        )


def verdict(shards: Iterable[Checked], known: dict[str, Shard]) -> dict[str, Any]:
    """Everything about a set, for people and programs."""
    classes: Counter[int] = Counter()
    sides: Counter[int] = Counter()
    channels: Counter[int] = Counter()
    where: dict[str, list[str]] = {}
    rows, rejected = [], []
    for shard in shards:
        classes.update(shard.classes)
        sides.update(shard.sides)
        channels.update(shard.channels)
        name = sources.basename(shard.path)
        for key in shard.keys:
            where.setdefault(key, []).append(name)
        bad = [reject._asdict() | {"shard": name} for reject in shard.rejected]
        if shard.path in known:
            bad += [
                {"shard": name, **Rejected("", -1, reason)._asdict()}
                for reason in unlike_index(shard, known[shard.path])
            ]
        rejected += bad
        rows.append(
            {
                "shard": sources.redacted(shard.path),
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "samples": shard.samples,
                "rejected": len(bad),
            }
        )
    twice = {key: names for key, names in where.items() if len(names) > 1}
    return {
        "shards": rows,
        "samples": sum(row["samples"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "rejected": rejected,
        "keys_in_several_shards": twice,
        "classes": {str(k): classes[k] for k in sorted(classes)},
        "shorter_sides": {str(side): count for side, count in sorted(sides.items())},
        "channels": {str(number): count for number, count in sorted(channels.items())},
    }


def picture(sides: dict[str, int], path: Path) -> None:
    """Draw how many images have which shorter side."""
    edges = [0, *SIDES, 10**9]
    counts, _ = np.histogram([int(s) for s in sides], edges, weights=list(sides.values()))
    names = [
        f"< {SIDES[0]}",
        *(f"{low} to {high - 1}" for low, high in pairwise(SIDES)),
        f"{SIDES[-1]} and more",
    ]
    image = Image.new("RGB", (640, 22 * len(names) + 40), "white")
    pen = ImageDraw.Draw(image)
    pen.text((10, 8), f"{int(counts.sum()):,} images by their shorter side in pixels", "black")
    for row, (name, count) in enumerate(zip(names, counts.tolist(), strict=True)):
        top = 32 + 22 * row
        pen.text((10, top + 3), name, "black")
        pen.rectangle((120, top, 120 + 420 * count / max(counts.max(), 1), top + 16), "steelblue")
        pen.text((550, top + 3), f"{int(count):,}", "black")
    with aside(path) as file:
        image.save(file, "PNG")


def print_verdict(found: dict[str, Any], what: str) -> None:
    """For people."""
    print(
        f"{what}: {found['samples']:,} samples in {len(found['shards'])} shards, "
        f"{found['bytes'] / 1e6:,.1f} MB"
    )
    labelled = {label: count for label, count in found["classes"].items() if int(label) != NO_LABEL}
    if labelled:
        least, most = (
            min(labelled, key=labelled.__getitem__),
            max(labelled, key=labelled.__getitem__),
        )
        same = labelled[least] == labelled[most]
        print(
            f"  {len(labelled)} classes of {labelled[least]}"
            f"{'' if same else f' (class {least}) to {labelled[most]} (class {most})'} samples"
        )
    if unlabelled := found["classes"].get(str(NO_LABEL), 0):
        print(f"  {unlabelled:,} samples have no label")
    if sides := {int(side): count for side, count in found.get("shorter_sides", {}).items()}:
        ordered = np.repeat(sorted(sides), [sides[side] for side in sorted(sides)])
        print(
            f"  shorter side {ordered[0]} to {ordered[-1]} pixels, median {int(np.median(ordered))}"
        )
    for number, count in found.get("channels", {}).items():
        if number != "3":
            print(f"  {count:,} images have {number} channels")
    if left_out := found.get("left_out"):
        print(f"  left out, for nothing in them can be read: {', '.join(left_out)}")
    lines = [
        f"{key}: in {', '.join(names)}"
        for key, names in found.get("keys_in_several_shards", {}).items()
    ]
    lines = [f"the same key in several shards: {line}" for line in lines]
    lines += [
        f"{row['shard']}/{row['key']} at byte {row['offset']}: {row['reason']}"
        if row["offset"] >= 0
        else f"{row['shard']}: {row['reason']}"
        for row in found.get("rejected", [])
    ]
    for line in lines[:_SHOWN]:
        print(f"  {line}")
    if len(lines) > _SHOWN:
        print(f"  ... and {len(lines) - _SHOWN} more; --json has all")


def described(patterns: Sequence[str]) -> dict[str, Any]:
    """What the index says of shards."""
    index = ShardIndex.open(patterns)
    sizes = np.concatenate([shard.rows["size"] for shard in index.shards]).astype(np.int64)
    return {
        "shards": [
            {
                "shard": sources.redacted(shard.path),
                "bytes": shard.size,
                "samples": shard.samples,
                "sha256": shard.sha256,
            }
            for shard in index.shards
        ],
        "samples": len(index),
        "bytes": sum(shard.size for shard in index.shards),
        "fingerprint": index.fingerprint,
        "classes": {
            str(label): count for label, count in sorted(Counter(index.labels.tolist()).items())
        },
        "image_bytes": {
            "least": int(sizes.min()),
            "median": int(np.median(sizes)),
            "most": int(sizes.max()),
        },
        "short": list(index.short),
    }


def ledger(run: Path) -> list[dict[str, Any]]:
    """The bad samples of a run, in the order of their positions.

    Raises ValueError: there is no such run.
    """
    path = run / "events.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: is no run's events.jsonl ({error})") from error
    found = {event["position"]: event for event in events if event.get("event") == "bad_sample"}
    # steps done again after a resume tell theirs again
    return [found[position] for position in sorted(found)]


def print_ledger(entries: Sequence[dict[str, Any]]) -> None:
    """For people: each sample once, with how often it was met."""
    met: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        met.setdefault((entry["shard"], entry["key"]), []).append(entry)
    if not entries:
        print("no bad samples")
        return
    reasons = Counter(entry["reason"] for entry in entries)
    print(f"{len(met)} samples could not be read, {len(entries)} times:")
    for (shard, key), times in sorted(met.items()):
        first = times[0]
        print(
            f"  {shard}/{key} at byte {first['offset']}, {len(times)} times: {first['reason']}; "
            f"read instead: {', '.join(sorted({entry['replaced_by'] for entry in times}))}"
        )
    for reason, count in reasons.most_common(5):
        print(f"  {count:>6} x {reason}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="No check sees damage that leaves a valid image: other colours in a JPEG, other "
        "pixels in a file "
        "without a checksum (.npy, .bmp, .tif).",
    )
    parser.add_argument(
        "command",
        choices=("verify", "report", "repair"),
        help="verify: read all, decode each image strictly, compare with the index; repair: write "
        "what is without a"
        " flaw into --out; report: tell what the index says, or with --ledger what a run "
        "could not read",
    )
    parser.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="shards, as data.shards names them: 'data/train-{000000..000099}.tar', 'data/*.tar', "
        "paths, URLs",
    )
    parser.add_argument(
        "--ledger", type=Path, metavar="RUN", help="a run's folder or events.jsonl, for report"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the clean shards, for repair"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="of the sizes, for verify")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: one for each core)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        if (options.command == "repair") != (options.out is not None):
            raise Refused(
                "repair writes into a new folder: give --out with it, and with nothing else"
            )
        if options.ledger is not None and options.command != "report":
            raise Refused("--ledger belongs to report")
        if options.ledger is not None:
            told = {"bad_samples": ledger(options.ledger)}
        elif options.command == "report":
            told = described(options.patterns)
        else:
            told = _read(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    try:
        if options.json:
            print(json.dumps(told, indent=1))
        elif "bad_samples" in told:
            print_ledger(told["bad_samples"])
        else:
            print_verdict(told, options.command)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return (
        1
        if any(map(told.get, ("bad_samples", "rejected", "keys_in_several_shards", "short")))
        else 0
    )


def _read(options: argparse.Namespace) -> dict[str, Any]:
    paths = expand(options.patterns, even_empty=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        if there := [path for path in paths if (options.out / sources.basename(path)).exists()]:
            raise Refused(
                f"{options.out} has {sources.basename(there[0])} already; give an empty folder"
            )
    checked = track(
        check_all(paths, options.jobs, options.out),
        "reading shards",
        total=len(paths),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    told = verdict(checked, indexed(paths))
    if options.out is not None:
        names = {sources.basename(row["shard"]): row["samples"] for row in told["shards"]}
        told["left_out"] = [name for name, count in names.items() if not count]
        for name in told["left_out"]:
            (options.out / name).unlink()
        clean = [str(options.out / name) for name, count in names.items() if count]
        if clean:
            told["fingerprint"] = ShardIndex.refresh(options.out, clean).fingerprint
    if options.picture is not None:
        picture(told["shorter_sides"], options.picture)
    return told


if __name__ == "__main__":
    raise SystemExit(main())
