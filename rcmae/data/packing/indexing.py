"""The index of a folder of shards, brought up to date."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rcmae.data import sources
from rcmae.data.index import ShardIndex, is_ours
from rcmae.data.patterns import expand
from rcmae.data.tars import NO_LABEL, Scan, Shard, together
from rcmae.errors import Refused

_log = logging.getLogger(__name__)


def refresh(
    folder: str | Path,
    paths: Sequence[str],
    *,
    rebuild: bool = False,
    jobs: int = 1,
    on_scan: Callable[[Scan], None] = lambda scan: None,
    rules: Mapping[str, str] = MappingProxyType({}),
) -> ShardIndex:
    """Write the index of a folder so that it covers these shards of it, and give it.

    What it says of these shards is kept where it is of the newest format, sound, and the shard is
    unchanged by size and time (or remote), unless `rebuild`. What it says of other
    shards of the folder is kept as long as they have their size. `rules`: path -> where keys end,
    of shards that are to have another rule than they had, or than WebDataset's.

    Raises:
        Refused: names every shard that cannot be used; the index is then what it was.
    """
    known: dict[str, Shard] = {}
    try:
        if is_ours(folder):
            known = {
                sources.identity(shard.path): shard for shard in ShardIndex.load(folder).shards
            }
    except Refused:
        if not rebuild:
            raise
    wanted = {sources.identity(path): path for path in paths}
    kept: dict[str, Shard] = {}
    ruled = {sources.identity(path): rule for path, rule in rules.items()}
    for path, shard in known.items():
        ruled.setdefault(path, shard.rule)
        if shard.rule == ruled[path] and _holds(
            shard, path, is_wanted=path in wanted, rebuild=rebuild
        ):
            kept[path] = shard
    missing = {path: where for path, where in wanted.items() if path not in kept}
    by_path = {where: ruled[path] for path, where in missing.items() if path in ruled}
    built = ShardIndex.build(list(missing.values()), jobs=jobs, on_scan=on_scan, rules=by_path)
    merged = kept | dict(zip(missing, built.shards, strict=True))
    index = ShardIndex([merged[path] for path in sorted(merged)])
    index.save(folder)
    return index


def by_folder(patterns: Sequence[str], out: str | None = None) -> dict[str, list[str]]:
    """Folder of an index -> the shards that it is to cover.

    Args:
        patterns: of the shards.
        out: the folder of all; None: each shard's own.

    Raises:
        Refused: a pattern names nothing, or remote shards have no folder here.
    """
    folders: dict[str, list[str]] = {}
    for path in expand(patterns):
        if out is None and sources.is_remote(path):
            raise Refused(
                f"{sources.redacted(path)} is remote; give --out, the folder for its index"
            )
        folder = out or os.path.dirname(path) or "."
        folders.setdefault(folder, []).append(path)
    return folders


def indexed_folder(
    folder: str, paths: Sequence[str], *, rebuild: bool, jobs: int, keys: str | None = None
) -> dict[str, Any]:
    """Bring the index of one folder up to date, and tell what is in it, as plain values.

    Arguments and errors of `refresh`; `keys`: where keys end in these shards (tars.RULES), if that
    is to change.
    """
    scans: list[Scan] = []
    rules = dict.fromkeys(paths, keys) if keys else {}
    index = refresh(folder, paths, rebuild=rebuild, jobs=jobs, on_scan=scans.append, rules=rules)
    without_image = sum(scan.without_image for scan in scans)
    bad_labels = sum(scan.bad_labels for scan in scans)
    return {
        "folder": folder,
        "shards": len(index.shards),
        "read": len(scans),
        "samples": len(index),
        "unlabelled": int((index.labels == NO_LABEL).sum()),
        "without_image": without_image,
        "bad_labels": bad_labels,
        "members": _members_of(index),
        "notes": _notes_of(index, scans),
        "fingerprint": index.fingerprint,
    }


def _members_of(index: ShardIndex) -> dict[str, int]:
    """Kind -> samples that have such a member, beside image and label."""
    kinds = {kind for shard in index.shards for kind in shard.kinds} - {"image", "label"}
    counts = {kind: len(index) - len(index.without(kind)) for kind in sorted(kinds)}
    return {kind: count for kind, count in counts.items() if count}


def _notes_of(index: ShardIndex, scans: Sequence[Scan]) -> list[dict[str, Any]]:
    """What is to be said of the tars: of those that were read now, and of the others what of them
    is not used.
    """
    read = {scan.shard.path: scan for scan in scans if scan.shard is not None}
    notes = []
    for shard in index.shards:
        said = read[shard.path].notes if shard.path in read else shard.notes
        notes += [(shard.name, note) for note in said]
    return [note._asdict() | {"text": str(note)} for note in together(notes)]


def _holds(shard: Shard, path: str, *, is_wanted: bool, rebuild: bool) -> bool:
    """Whether what an index says of a shard stays in it."""
    if is_wanted and (rebuild or not _is_sound(shard)):
        return False
    if sources.is_remote(path):
        return True
    stat = sources.stat_here(path)
    if stat is None or stat.size != shard.size:
        return False
    return not is_wanted or (bool(shard.digest) and stat.stamp == shard.stamp)


def _is_sound(shard: Shard) -> bool:
    try:
        shard.check_table()
    except Refused as error:
        _log.warning("%s", str(error).partition(";")[0])
        return False
    return True
