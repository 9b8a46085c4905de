"""The index of a folder of shards, brought up to date."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rcmae.data import sources
from rcmae.data.index import ShardIndex, is_ours
from rcmae.data.patterns import expand
from rcmae.data.tars import NO_LABEL, Scan, Shard
from rcmae.errors import Refused


def refresh(
    folder: str | Path,
    paths: Sequence[str],
    *,
    rebuild: bool = False,
    jobs: int = 1,
    on_scan: Callable[[Scan], None] = lambda scan: None,
) -> ShardIndex:
    """Write the index of a folder so that it covers these shards of it, and give it.

    What it says of shards that still have their size (and of those elsewhere) is kept, of these
    ones too unless `rebuild`.

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
    for path, shard in known.items():
        if rebuild and path in wanted:
            continue
        if sources.is_remote(path) or _size(path) == shard.size:
            kept[path] = shard
    missing = {path: where for path, where in wanted.items() if path not in kept}
    built = ShardIndex.build(list(missing.values()), jobs=jobs, on_scan=on_scan)
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
        Refused: a pattern names nothing, or shards from elsewhere have no folder here.
    """
    folders: dict[str, list[str]] = {}
    for path in expand(patterns):
        if out is None and sources.is_remote(path):
            raise Refused(
                f"{sources.redacted(path)} lies elsewhere; say with --out where its index is to "
                "be put"
            )
        folder = out or os.path.dirname(path) or "."
        folders.setdefault(folder, []).append(path)
    return folders


def indexed_folder(
    folder: str, paths: Sequence[str], *, rebuild: bool, jobs: int
) -> dict[str, Any]:
    """Bring the index of one folder up to date, and tell what is in it, as plain values.

    Arguments and errors of `refresh`.
    """
    scans: list[Scan] = []
    index = refresh(folder, paths, rebuild=rebuild, jobs=jobs, on_scan=scans.append)
    return {
        "folder": folder,
        "shards": len(index.shards),
        "read": len(scans),
        "samples": len(index),
        "unlabelled": int((index.labels == NO_LABEL).sum()),
        "without_image": sum(scan.without_image for scan in scans),
        "bad_labels": sum(scan.bad_labels for scan in scans),
        "fingerprint": index.fingerprint,
    }


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None
