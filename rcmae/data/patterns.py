"""Which shards a user names (paths, braces, globs, URLs, commands, lists of them, mixtures), and
which of the indexes that are found is believed of each.

An index is believed of a shard that is still what it was by size and time. A shard that was written
since has its headers read again: it may be a copy."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from stat import S_ISREG
from typing import NamedTuple, Protocol

import numpy as np

from rcmae.data import sources
from rcmae.data.sources import USUAL, Patience, Stat
from rcmae.data.sources.braces import MOST, expanded
from rcmae.data.tars import IMAGE_SUFFIXES, Shard
from rcmae.errors import Refused

_NAMED = 20  # problems that a message lists before it counts the rest
# bytes of tables that are read on opening; what is more is checked where it is first used
_CHECKED_AT_ONCE = 2**30
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_LOOKED_AT = 10_000  # files of a folder that is given instead of shards
_log = logging.getLogger(__name__)


class Weighted(Protocol):
    """A set of a mixture."""

    @property
    def shards(self) -> str | Sequence[str]:
        """Its patterns."""

    @property
    def weight(self) -> float:
        """What part of an epoch it makes, in proportion to the others."""


Patterns = str | Sequence[str] | Sequence[Weighted]


def expand(patterns: str | Sequence[str], *, even_empty: bool = False) -> list[str]:
    """The shards that a pattern or a list of them names: `train-{000000..000005}.tar`,
    `data/*.tar`, plain paths, URLs with either, `pipe:` commands with braces.

    Raises:
        Refused: names each pattern that matches no file and each shard that is missing, empty
            (unless `even_empty`), unreadable or named twice, all at once.
    """
    paths, problems = shards_named(patterns, even_empty=even_empty)
    refuse_shards([*problems, *named_twice(paths)])
    return paths


def flat(patterns: Patterns) -> list[str]:
    """The patterns of all sets, without their weights."""
    sets = (
        [patterns]
        if isinstance(patterns, str)
        else [one if isinstance(one, str) else one.shards for one in patterns]
    )
    return [pattern for one in sets for pattern in ([one] if isinstance(one, str) else one)]


def shards_named(
    patterns: Patterns, patience: Patience = USUAL, *, even_empty: bool = False
) -> tuple[list[str], list[str]]:
    """(the shards that patterns name, in order; what is wrong with them, a line each)."""
    paths: list[str] = []
    problems: list[str] = []
    for pattern in flat(patterns):
        try:
            here = pattern if sources.is_remote(pattern) else os.path.expanduser(pattern)
            pieces = expanded(here, MOST - len(paths))
        except Refused as error:
            problems.append(f"{sources.redacted(pattern):.200}: {error}")
            continue
        for piece in pieces:
            if piece.startswith(sources.PIPE) and not pattern.startswith(sources.PIPE):
                # who looks for commands in a recipe looks at the patterns
                problems.append(f"{sources.redacted(piece)}: a command stands before its braces")
                continue
            try:
                found = sources.find(piece, patience)
            except (ValueError, OSError) as error:
                problems.append(f"{sources.redacted(piece)}: {error}")
                continue
            if not found:
                of = f" (of {sources.redacted(pattern)})" if piece != pattern else ""
                problems.append(f"{sources.redacted(piece)}: matches no file{of}")
            paths += found
    if not paths and not problems:
        problems.append(
            "no shards are named; give data.shards a pattern, such as "
            "data/train-{000000..000099}.tar"
        )
    problems += filter(
        None, (_not_a_shard(path, even_empty=even_empty) for path in dict.fromkeys(paths))
    )
    return paths, problems


def sets_named(
    patterns: Patterns, patience: Patience = USUAL
) -> tuple[list[str], list[str], list[tuple[int, float]]]:
    """(the shards of all sets, in order; what is wrong with them, a line each; of a mixture the
    number of shards and the weight of each set).
    """
    sets = [(one.shards, one.weight) for one in patterns if not isinstance(one, str)]
    if not sets:
        paths, problems = shards_named(patterns, patience)
        return paths, [*problems, *named_twice(paths)], []
    paths = []
    problems = []
    weights = []
    for shards, weight in sets:
        found, wrong = shards_named(shards, patience)
        paths += found
        problems += wrong
        weights.append((len(found), weight))
    return paths, [*problems, *named_twice(paths)], weights


def named_twice(paths: Sequence[str]) -> list[str]:
    """A line for each shard that is named more than once, also by links."""
    folder_of = cache(os.path.realpath)
    met: dict[str, str] = {}
    times: Counter[str] = Counter()
    for path in paths:
        one = sources.identity(path)
        if not sources.is_remote(path):
            head, tail = os.path.split(one)
            one = os.path.join(folder_of(head), tail)
            one = os.path.realpath(one) if os.path.islink(one) else one
        times[one] += 1
        met.setdefault(one, path)
    return [
        f"{sources.redacted(met[one])}: is named {count} times"
        for one, count in times.items()
        if count > 1
    ]


def _not_a_shard(path: str, *, even_empty: bool) -> str | None:
    if sources.is_remote(path):
        return None  # asked for with all others: sources.sizes
    try:
        if os.path.isdir(path):
            return f"{path}: {_instead_of(path)}"
        about = os.stat(path)
        if not S_ISREG(about.st_mode):  # opening a pipe waits for who writes it
            return f"{path}: is a pipe, socket or device; images are read by offset from files"
        if about.st_size == 0 and not even_empty:
            return f"{path}: is empty"
    except OSError as error:
        return f"{path}: {error.strerror}"
    if path.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
        return f"{path}: is an image, not a tar; name its folder"
    return None if os.access(path, os.R_OK) else f"{path}: is not readable"


def _instead_of(folder: str) -> str:
    """What to do where a folder is named, by what is in it."""
    inside = folder.rstrip("/")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, _LOOKED_AT))
    tars = [name for name in names if name.endswith(".tar")]
    if not tars and _has_images(folder):
        stem = os.path.basename(inside)
        stem = stem if _PLAIN.fullmatch(stem) else "images"
        making = f"rcmae shards make {shlex.quote(folder)} {shlex.quote(f'{inside}-shards')}"
        return (
            f"is a folder of images; pack them, {making} --name {stem} --size 256, and name "
            f"{inside}-shards/{stem}-*.tar (to train: data.images={folder} in the place of "
            "data.shards packs them by itself)"
        )
    if not tars:
        return "is a folder without tars or images"
    stems = sorted({name.rpartition("-")[0] for name in tars})
    if not all(stems) or not 0 < len(stems) <= _NAMED:
        stems = []
    offered = [f"{inside}/{stem}-*.tar" for stem in stems] or [f"{inside}/*.tar"]
    return f"is a folder; name the shards in it: {' or '.join(offered)}"


def _has_images(folder: str) -> bool:
    """Whether some image lies in a folder or in the first folders of it."""
    looked_at = 0
    for _, folders, files in os.walk(folder):
        if any(name.rpartition(".")[2].lower() in IMAGE_SUFFIXES for name in files):
            return True
        looked_at += 1 + len(files)
        if looked_at > _LOOKED_AT:
            break
        folders.sort()
    return False


def refuse_shards(problems: Sequence[str]) -> None:
    """Raise Refused where there are problems; names the first of them."""
    if problems:
        rest = [f"... and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        raise Refused("\n".join(["shards that cannot be used:", *problems[:_NAMED], *rest]))


# ------------------------------------------------------------------------- what is believed of them


class Indexed(NamedTuple):
    """What an index says."""

    shards: Sequence[Shard]
    written_ns: int  # when it was written; 0: not known


class _Known(NamedTuple):
    """What an index says of a shard."""

    shard: Shard
    folder: str  # of the index
    written_ns: int  # when the index was; 0: not known


class Pick(NamedTuple):
    """What is to be believed of a shard."""

    shard: Shard | None = None
    is_sure: bool = False  # else its headers have to be read, and compared


class Search:
    """What the indexes in some folders, and beside the shards, say of shards.

    The newest is believed: of two that differ the one that describes the shard as it is."""

    def __init__(
        self,
        paths: Sequence[str],
        caches: Sequence[str],
        indexed: Callable[[str, Patience], Indexed | None],
        patience: Patience,
    ) -> None:
        """Read the indexes.

        Args:
            paths: of the shards.
            caches: folders to look into, beside those of the shards.
            indexed: gives what an index in a folder says; may raise Refused and OSError.
            patience: with remote shards.
        """
        self.problems: list[str] = []
        self.short: list[str] = []  # shards with fewer bytes than they were indexed with
        self._unchecked = _CHECKED_AT_ONCE  # bytes of tables that may still be read
        self._known: dict[str, list[_Known]] = {}
        gone: set[str] = set()
        folders = [*caches, *filter(None, map(sources.folder_of, paths))]
        for folder in dict.fromkeys(folders):
            try:
                found = indexed(folder, patience)
            except NotADirectoryError:  # a file is in its way: whoever writes there says so
                continue
            except (Refused, OSError) as error:
                self.problems.append(str(error))
                gone.add(folder)
                continue
            if found is None:
                continue
            for shard in found.shards:
                known = _Known(shard, folder, found.written_ns)
                self._known.setdefault(sources.identity(shard.path), []).append(known)
        self._times_bare = Counter(map(sources.bare, paths))
        here = [path for path in paths if not sources.is_remote(path)]
        elsewhere = [path for path in paths if sources.is_remote(path)]
        asked = [path for path in elsewhere if sources.folder_of(path) not in gone]
        self._stats = sources.stats(asked, patience)
        for path in here:
            self._stats[path] = sources.stat_here(path)
        for path, stat in self._stats.items():
            if isinstance(stat, OSError) and "://" in path:
                self.problems.append(str(stat))

    def pick(self, path: str, needs: Collection[str]) -> Pick:
        """What is to be believed of a shard."""
        candidates = self._known.get(sources.identity(path), [])
        if not candidates and self._times_bare[sources.bare(path)] == 1:
            candidates = self._known.get(sources.bare(path), [])  # of an index of before
        if not candidates:
            return Pick()
        stat = self._stats.get(path)
        if not isinstance(stat, Stat) or stat.size is None:
            chosen = candidates[0]
            is_sure = True
        else:
            chosen, is_sure = self._choose(path, stat, candidates)
        shard = replace(chosen.shard, path=path)
        shown = sources.redacted(path)
        if shard.fingerprint != candidates[0].shard.fingerprint:
            _log.warning(
                "%s: the index in %s differs from the newer one in %s, which is used",
                shown,
                candidates[0].folder,
                chosen.folder,
            )
        if not set(needs) <= {"image", "label", *shard.kinds}:
            kinds = " and ".join(needs)
            _log.warning("%s: its index lacks where the %s lie; read again", shown, kinds)
            return Pick()
        if self._unchecked > 0 and isinstance(shard.kept.table, str):
            self._unchecked -= shard.kept.length
            try:
                shard.check_table()
            except Refused as error:
                _log.warning("%s; its headers are read again", str(error).partition(";")[0])
                return Pick()
        return Pick(shard, is_sure)

    def _choose(self, path: str, stat: Stat, candidates: list[_Known]) -> tuple[_Known, bool]:
        """(the candidate that describes a shard as it is, whether that is sure)."""
        assert stat.size is not None
        by_age = sorted(candidates, key=lambda known: -known.written_ns)
        alike = [known for known in by_age if known.shard.size == stat.size]
        is_here = not sources.is_remote(path)
        if not alike:
            newest = by_age[0]
            if is_here and stat.size < newest.shard.size:
                self.short.append(path)
            else:
                self.problems.append(_another(path))
            return newest, True
        for known in candidates:
            if known.shard.stamp and known.shard.stamp == stat.stamp:
                return known, True
        if is_here:
            # format 1 has no times: one that was written after the shard is believed
            written_ns = int(stat.stamp.split(" ")[1])
            for known in alike:
                if not known.shard.stamp and known.written_ns >= written_ns:
                    return known, True
            return alike[0], False
        known = next(each for each in candidates if each.shard.size == stat.size)
        if not known.shard.sha256 and sources.is_other(stat.stamp, known.shard.stamp):
            self.problems.append(_another(path))  # else its copy is compared with the hash
        return known, True


def _another(path: str) -> str:
    return (
        f"{sources.redacted(path)}: is not the file that its index describes; run "
        f"{sources.indexing(path)}"
    )


def unlike(before: Shard, now: Shard) -> list[str]:
    """In what a shard that was written since is not what was indexed: a line, or none."""
    if before.fingerprint == now.fingerprint:
        return []
    fields = ["offset", "size", "label", "key", "key_size"]
    count = min(before.samples, now.samples)
    same = np.all(
        [before.rows[field][:count] == now.rows[field][:count] for field in fields], axis=0
    )
    other = max(before.samples, now.samples) - int(np.count_nonzero(same))
    what = f"{other} of its {now.samples} samples lie at other offsets or have other labels"
    if not other:
        what = "its samples have other keys"
    path = sources.redacted(now.path)
    return [
        f"{path}: was written after it was indexed, and {what}; run {sources.indexing(now.path)}"
    ]
