"""Every sample of a set of shards, numbered: where its image lies, its label and its key. No torch.

The index knows for every image where its bytes lie in its tar, so training reads by offset and
needs no tar library. It is a file beside the shards (`index.json`, and a binary table that is
mapped, not read); for shards without one it is built in memory by reading their headers. Shards
from elsewhere (rcmae/data/sources.py) are indexed alike, and their index may lie beside them
there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae.data import sources
from rcmae.data.patterns import Patterns, named_twice, refuse_shards, shards_named
from rcmae.data.sources import USUAL, Patience
from rcmae.data.tars import Scan, Shard, not_a_tar, scan_all
from rcmae.errors import Refused
from rcmae.files import aside

INDEX = "index.json"
FORMAT, VERSION = "rcmae shard index", 1


class Sample(NamedTuple):
    """What it takes to read a sample."""

    shard: Shard
    id: str  # "shard/key"
    offset: int  # bytes from the start of the tar
    size: int
    label: int

    @property
    def path(self) -> str:
        """Of its shard."""
        return self.shard.path


class ShardIndex:
    """Every sample of a list of shards, numbered from 0 in the order of the list.

    It is small to hand to another process: tables that lie in files travel by name and are mapped
    there."""

    def __init__(
        self,
        shards: Sequence[Shard],
        short: Sequence[str] = (),
        weights: Sequence[tuple[int, float]] = (),
    ) -> None:
        self.shards = tuple(shards)
        # of a mixture's sets: (shards, weight) of each, in order; else empty
        self.weights = tuple(weights)
        # shards with fewer bytes than they were indexed with: their last samples are bad
        self.short = tuple(short)
        self.counts = np.array([shard.samples for shard in self.shards], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        # of a shard: name and rows, once they were used
        self._views: dict[int, tuple[str, NDArray[np.void]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}

    @classmethod
    def open(
        cls,
        patterns: Patterns,
        *,
        cache: str | Path | Sequence[str | Path] = (),
        jobs: int = 1,
        patience: Patience = USUAL,
        scan: bool = True,
    ) -> ShardIndex:
        """The index of the shards that `patterns` name: from their folders or from `cache`, else
        built in memory.

        Args:
            patterns: what `expand` takes, or sets of a mixture, each of that.
            cache: folders in which `save` may have left an index of these shards, beside those next
                to them.
            jobs: processes that read tar headers where shards have no index.
            patience: with shards from elsewhere.
            scan: False refuses shards without an index instead of reading them.

        Raises:
            ValueError: names every pattern and shard that cannot be used.
        """
        sets = [(one.shards, one.weight) for one in patterns if not isinstance(one, str)]
        found = (
            [shards_named(shards, patience) for shards, _ in sets]
            if sets
            else [shards_named(patterns, patience)]
        )
        paths = [path for some, _ in found for path in some]
        problems = [*(problem for _, some in found for problem in some), *named_twice(paths)]
        weights = [(len(some), weight) for (some, _), (_, weight) in zip(found, sets, strict=False)]
        known: dict[str, Shard] = {}
        caches = [cache] if isinstance(cache, str | Path) else cache
        folders, gone = (
            [*map(str, caches), *filter(None, map(sources.folder_of, paths))],
            set[str](),
        )
        for folder in dict.fromkeys(folders):
            try:
                if (index := cls._found(folder, patience)) is not None:
                    known = {sources.identity(shard.path): shard for shard in index.shards} | known
            except (ValueError, OSError) as error:
                problems.append(str(error))
                gone.add(folder)
        there: dict[str, int | OSError | None] = {
            path: _size(path) for path in paths if not sources.is_remote(path)
        }
        elsewhere = [
            path
            for path in paths
            if sources.is_remote(path) and sources.folder_of(path) not in gone
        ]
        there |= sources.sizes(elsewhere, patience)
        problems += [
            str(error)
            for path, error in there.items()
            if isinstance(error, OSError) and "://" in path
        ]
        short, shards = [], dict[str, Shard]()
        for path, size in there.items():
            shard = known.get(sources.identity(path))
            if shard is None:
                continue
            shards[path] = replace(shard, path=path)
            if not isinstance(size, int):
                continue
            if size > shard.size or (size < shard.size and sources.is_remote(path)):
                problems.append(
                    f"{sources.redacted(path)}: is not the file that the index beside it "
                    "describes; "
                    "run rcmae shards index --rebuild on it"
                )
            elif size < shard.size:
                short.append(path)
        unknown = [path for path in paths if path not in shards]
        problems += filter(None, map(not_a_tar, unknown))
        if not scan:
            problems += [
                f"{sources.redacted(path)}: has no index; run rcmae shards index on it"
                for path in unknown
            ]
        refuse_shards(problems)
        fresh = cls.build(unknown, jobs=jobs, patience=patience).shards if unknown else ()
        built = dict(zip(unknown, fresh, strict=True))
        return cls([built.get(path) or shards[path] for path in paths], short, weights)

    @staticmethod
    def lies_in(folder: str, patience: Patience = USUAL) -> bool:
        """Whether a folder, here or elsewhere, has an index. Raises as `open`."""
        if "://" not in folder:
            return is_ours(folder)
        try:  # its table, which may be large, is read once: by `open`
            return (
                FORMAT.encode() in (sources.small_file(f"{folder}/{INDEX}", patience) or b"")[:100]
            )
        except OSError as error:
            raise Refused(str(error)) from error

    @classmethod
    def _found(cls, folder: str, patience: Patience) -> ShardIndex | None:
        """The index in a folder, here or elsewhere, if there is one of this package."""
        if "://" not in folder:
            return cls.load(folder) if is_ours(folder) else None
        head = sources.small_file(f"{folder}/{INDEX}", patience)
        if head is None or FORMAT.encode() not in head[:100]:
            return None
        try:
            described = json.loads(head)
            table = sources.small_file(f"{folder}/{described['table']}", patience) or b""
            return cls._described(described, folder, table, len(table))
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{folder}/{INDEX}: cannot be used ({error}); write it anew") from error

    @classmethod
    def build(
        cls,
        paths: Sequence[str],
        *,
        jobs: int = 1,
        on_scan: Callable[[Scan], None] = lambda scan: None,
        patience: Patience = USUAL,
    ) -> ShardIndex:
        """The index of these tars from their headers alone, in memory; `on_scan` sees each shard's
        as it is done.

        Raises:
            ValueError: names every shard that is no tar, ends too early or holds no image.
        """
        shards, problems = [], []
        for scan in scan_all(paths, jobs, patience):
            on_scan(scan)
            if scan.shard is None:
                problems.append(scan.problem)
            else:
                shards.append(scan.shard)
        refuse_shards(problems)
        return cls(shards)

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """The index that `save` wrote into a folder. The shards themselves are not looked at.

        Raises:
            ValueError: the index is damaged or of another version.
        """
        path = Path(folder) / INDEX
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            table = path.parent / head["table"]
            return cls._described(head, str(path.parent), str(table), table.stat().st_size)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"{path}: cannot be used ({error}); run rcmae shards index --rebuild"
            ) from error

    @classmethod
    def _described(
        cls, head: dict[str, Any], folder: str, table: str | bytes, size: int
    ) -> ShardIndex:
        """The index that a parsed index.json of a folder describes.

        Raises what damaged ones lead to.
        """
        if head["version"] != VERSION:
            raise Refused(f"version {head['version']}, this package reads {VERSION}")
        if size != head["bytes"]:
            raise Refused(f"{head['table']} has {size} bytes of {head['bytes']}")
        at, shards = 0, []
        for entry in head["shards"]:
            name, length = entry["name"], entry["table_bytes"]
            path = name if sources.is_remote(name) or os.path.isabs(name) else f"{folder}/{name}"
            shards.append(
                Shard(
                    path,
                    entry["bytes"],
                    entry["samples"],
                    entry["fingerprint"],
                    table,
                    at,
                    length,
                    entry.get("sha256", ""),
                )
            )
            at += length
        if at != head["bytes"] or cls(shards).fingerprint != head["fingerprint"]:
            raise Refused("its parts do not add up")
        return cls(shards)

    def save(self, folder: str | Path) -> Path:
        """Write the index into a folder, the shards' or another; a reader sees the old one or the
        new one.

        Raises:
            ValueError: an index.json of another program lies there.
        """
        folder = Path(folder)
        if (folder / INDEX).exists() and not is_ours(folder):
            raise Refused(f"{folder / INDEX}: belongs to another program; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        here = os.path.abspath(folder)

        def name(path: str) -> str:  # shards beside the index move with it
            path = sources.identity(path)
            if sources.is_remote(path):
                return path
            return os.path.basename(path) if os.path.dirname(path) == here else path

        table = f"index-{self.fingerprint[:16]}.bin"
        head = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "samples": len(self),
            "table": table,
            "bytes": sum(shard.length for shard in self.shards),
            "shards": [
                {
                    "name": name(shard.path),
                    "bytes": shard.size,
                    "samples": shard.samples,
                    "table_bytes": shard.length,
                    "fingerprint": shard.fingerprint,
                    **({"sha256": shard.sha256} if shard.sha256 else {}),
                }
                for shard in self.shards
            ],
        }
        with aside(folder / table) as file:
            file.writelines(shard.part for shard in self.shards)
        with aside(folder / INDEX) as file:
            file.write(json.dumps(head, indent=1).encode() + b"\n")
        for old in folder.glob("index-*.bin"):
            if old.name != table:
                old.unlink(missing_ok=True)  # who mapped it keeps it
        return folder / INDEX

    @cached_property
    def fingerprint(self) -> str:
        """What the numbers of the samples mean: names, sizes, counts and sample tables of the
        shards, in order.
        """
        mixture = [json.dumps(self.weights)] if self.weights else []
        return hashlib.sha256(
            "\n".join([*(shard.fingerprint for shard in self.shards), *mixture]).encode()
        ).hexdigest()

    @property
    def is_saved(self) -> bool:
        """Whether all of it lies in files, so that opening it again reads no tar."""
        return not any(isinstance(shard.table, bytes) for shard in self.shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Sample:
        """The sample of a number."""
        which, row = self.place(number)
        shard = self.shards[which]
        view = self._views.get(which)
        if view is None:
            view = self._views[which] = (shard.name, shard.rows)
        name, rows = view
        offset, size, label, at, length = rows[row].item()
        return Sample(shard, f"{name}/{shard.key_at(at, length)}", offset, size, label)

    def shards_of(self, numbers: NDArray[np.int64]) -> list[int]:
        """The numbers of the shards that hold these samples, each once, in the order in which
        they are met.
        """
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        return list(dict.fromkeys(shards.tolist()))

    def place(self, number: int) -> tuple[int, int]:
        """(number of the shard, row in it) of a sample."""
        shard = int(self._starts.searchsorted(number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """[samples] the label of each, NO_LABEL where it has none. Reads the whole table."""
        return np.concatenate([shard.rows["label"] for shard in self.shards]).astype(np.int64)


def is_ours(folder: str | Path) -> bool:
    """Whether the index.json of a folder, where there is one, is of this package."""
    try:
        with open(os.path.join(folder, INDEX), "rb") as file:
            return FORMAT.encode() in file.read(100)
    except FileNotFoundError:
        return False


def _size(path: str) -> int | None:
    """Bytes of a file here; None where there is none: _not_a_shard has said it."""
    try:
        return os.path.getsize(path)
    except OSError:
        return None
