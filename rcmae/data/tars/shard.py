"""A shard: a tar, and the part of an index table that says what lies where in it.

The part is a row for each sample and the samples' keys; format 2 adds their members."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae.data import sources
from rcmae.data.tars.kinds import ADDED, KINDS
from rcmae.data.tars.samples import FIRST_DOT, RULES, WORDS, Note
from rcmae.errors import Refused
from rcmae.files import patiently

# A shard's part of an index table: a ROW for each sample, then the samples' keys. Format 2 adds a
# HEADED for each sample and a MEMBER for each of their other members, in the samples' order.
ROW = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u4"), ("key_size", "<u2")]
)
# of a sample: the checksum in its image's tar header, its first other member, how many these are
HEADED = np.dtype([("checksum", "<u4"), ("first", "<u4"), ("others", "u1")])
MEMBER = np.dtype([("kind", "u1"), ("offset", "<u8"), ("size", "<u8"), ("checksum", "<u4")])
HEADER = 512  # bytes of a member's header, right before its content
NO_LABEL = -100
_PLAIN_NAME = 90  # bytes of a member's name that every kind of header has room for


class Member(NamedTuple):
    """A member of a sample."""

    kind: str  # of KINDS
    offset: int  # of its content, in bytes from the start of the tar
    size: int
    checksum: int  # as its tar header has it


class TablePart(NamedTuple):
    """Where a shard's part of an index table lies."""

    table: str | bytes  # the file that holds the part, or the part itself
    at: int = 0  # where the part begins
    length: int = 0  # bytes of the part


@dataclass(frozen=True)
class Shard:
    """One tar, and where its part of the index table lies."""

    path: str  # or URL, or `pipe:` command
    size: int  # bytes of the tar when it was indexed
    samples: int
    fingerprint: str  # of name, size, count, rows and keys
    kept: TablePart = field(repr=False)
    sha256: str = ""  # of the tar, where somebody has read all of it
    # what it had when it was indexed (`sources.Stat`); empty: not known
    stamp: str = ""
    digest: str = ""  # of what the fingerprint is of, and the members; empty in format 1
    others: int = 0  # members of all samples but their images
    kinds: tuple[str, ...] = ()  # that were looked for; empty in format 1
    rule: str = FIRST_DOT  # where keys end
    notes: tuple[Note, ...] = ()  # what of the tar is not used

    @property
    def name(self) -> str:
        """The file name without `.tar`: the first half of a sample id."""
        return sources.basename(self.path).removesuffix(".tar")

    @property
    def rows(self) -> NDArray[np.void]:
        """[samples] of ROW, a view of the table."""
        return np.frombuffer(self._buffer, ROW, self.samples, self.kept.at)

    @property
    def headed(self) -> NDArray[np.void] | None:
        """[samples] of HEADED, a view of the table; None in format 1."""
        if not self.digest:
            return None
        return np.frombuffer(self._buffer, HEADED, self.samples, self._keys_end)

    def key_at(self, at: int, length: int) -> str:
        """The WebDataset key that a row of the table says to lie there among the keys."""
        start = self.kept.at + ROW.itemsize * self.samples + at
        return self._buffer[start : start + length].decode("utf-8", "surrogateescape")

    def members_of(self, row: int) -> list[Member]:
        """The members of a sample, its image first. In format 1 the image alone, without a
        checksum (-1).
        """
        image = self.rows[row]
        headed = self.headed
        if headed is None:
            return [Member("image", int(image["offset"]), int(image["size"]), -1)]
        head = headed[row]
        found = [
            Member("image", int(image["offset"]), int(image["size"]), int(head["checksum"])),
        ]
        start = self._keys_end + HEADED.itemsize * self.samples
        table = np.frombuffer(self._buffer, MEMBER, self.others, start)
        first = int(head["first"])
        for kind, offset, size, checksum in table[first : first + int(head["others"])].tolist():
            name = self._kind_of(kind)
            if name is not None:  # a newer package may know more
                found.append(Member(name, offset, size, checksum))
        return found

    def number_of(self, kind: str) -> int:
        """The number of a kind in this shard's table."""
        if kind in KINDS:
            return KINDS.index(kind)
        return ADDED + self._added.index(kind)

    def _kind_of(self, number: int) -> str | None:
        if number < ADDED:
            return KINDS[number] if number < len(KINDS) else None
        return self._added[number - ADDED] if number - ADDED < len(self._added) else None

    @property
    def _added(self) -> list[str]:
        """Kinds that are not of this package, in the order of their numbers."""
        return [kind for kind in self.kinds if kind not in KINDS]

    def having(self, kind: str) -> NDArray[np.bool_]:
        """[samples] whether each has a member of a kind, as far as the index knows."""
        has = np.zeros(self.samples, bool)
        headed = self.headed
        if headed is None or kind not in self.kinds:
            return has
        start = self._keys_end + HEADED.itemsize * self.samples
        table = np.frombuffer(self._buffer, MEMBER, self.others, start)
        of_row = np.repeat(np.arange(self.samples), headed["others"])
        has[of_row[table["kind"] == self.number_of(kind)]] = True
        return has

    @property
    def part(self) -> bytes:
        """A copy of this shard's part of the table."""
        return self._buffer[self.kept.at : self.kept.at + self.kept.length]

    def check_table(self) -> None:
        """Read this shard's part of the table, and compare it with its hashes.

        Raises:
            Refused: it is not what was written.
        """
        buffer = memoryview(self._buffer)
        fingerprint, digest = hashes(
            self,
            buffer[self.kept.at : self._keys_end],
            buffer[self._keys_end : self.kept.at + self.kept.length],
        )
        rows = self.rows
        ends = np.minimum(rows["offset"], self.size + 1) + rows["size"]  # without overflow
        if (
            fingerprint != self.fingerprint
            or (self.digest and digest != self.digest)
            or int(ends.max(initial=0)) > self.size
        ):
            table = self.kept.table if isinstance(self.kept.table, str) else "its table"
            raise Refused(
                f"{table}: what it says of "
                f"{sources.redacted(self.path)} is damaged; run {sources.indexing(self.path)}"
            )

    @property
    def _keys_end(self) -> int:
        """Where the rows and keys end, and the members begin."""
        if not self.digest:
            return self.kept.at + self.kept.length
        members = HEADED.itemsize * self.samples + MEMBER.itemsize * self.others
        return self.kept.at + self.kept.length - members

    @property
    def _buffer(self) -> bytes | mmap.mmap:
        return self.kept.table if isinstance(self.kept.table, bytes) else _mapped(self.kept.table)


_tables: dict[str, mmap.mmap] = {}  # that are open in this process


def _mapped(path: str) -> mmap.mmap:
    # A table's name carries its content's hash, so a file that was mapped once never changes under
    # its name.
    table = _tables.get(path)
    if table is None:
        with patiently(lambda: open(path, "rb")) as file:
            table = _tables[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return table


def forget_table(path: str) -> None:
    """Reopen a table at its next use. Rows that were handed out stay valid."""
    _tables.pop(path, None)


def hashes(
    shard: Shard, rows_and_keys: bytes | memoryview, members: bytes | memoryview
) -> tuple[str, str]:
    """(fingerprint of a shard, digest of all of its part of the table)."""
    about = [sources.basename(shard.path), shard.size, shard.samples]
    hashed = hashlib.sha256(json.dumps(about).encode())
    hashed.update(rows_and_keys)
    fingerprint = hashed.hexdigest()
    hashed.update(members)
    return fingerprint, hashed.hexdigest()


# ------------------------------------------------------------------------- a shard in an index.json

_MOST = 2**63 - 1
_HASH = re.compile(r"[0-9a-f]{64}")


def entry_of(shard: Shard, name: str) -> dict[str, Any]:
    """What an index.json says of a shard, under the name that it has there."""
    entry: dict[str, Any] = {
        "name": name,
        "bytes": shard.size,
        "samples": shard.samples,
        "table_bytes": shard.kept.length,
        "fingerprint": shard.fingerprint,
    }
    if shard.sha256:
        entry["sha256"] = shard.sha256
    if shard.stamp:
        entry["stamp"] = shard.stamp
    if shard.digest:
        ours = [kind for kind in shard.kinds if kind in KINDS]
        entry |= {"digest": shard.digest, "others": shard.others, "kinds": len(ours)}
        if added := [kind for kind in shard.kinds if kind not in KINDS]:
            entry["added_kinds"] = added
    if shard.rule != FIRST_DOT:
        entry["keys"] = shard.rule
    if shard.notes:
        entry["not_used"] = {note.what: [note.number, *note.such_as] for note in shard.notes}
    return entry


def shard_of(entry: Any, folder: str, table: str | bytes, at: int) -> Shard:
    """The shard that an index.json describes in an entry.

    Args:
        entry: as JSON has it; nothing of it is believed.
        folder: of the index, local or remote.
        table: as of a Shard.
        at: where the shard's part of it begins.

    Raises:
        Refused: it is not a description of a shard.
    """
    if not isinstance(entry, dict):
        raise Refused(f"a shard is {entry!r:.50}")
    name = entry.get("name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise Refused(f"a shard's name is {name!r}")
    path = name
    if not sources.is_remote(name) and not os.path.isabs(name):
        if os.path.basename(name) != name or name in (".", ".."):
            raise Refused(f"a shard's name {name!r} leads out of the folder")
        path = f"{folder}/{name}"
    digest = _hash(entry, "digest", optional=True)
    shard = Shard(
        path=path,
        size=_count(entry, "bytes"),
        samples=_count(entry, "samples"),
        fingerprint=_hash(entry, "fingerprint"),
        kept=TablePart(table, at, _count(entry, "table_bytes")),
        sha256=_hash(entry, "sha256", optional=True),
        stamp=entry.get("stamp", ""),
        digest=digest,
        others=_count(entry, "others") if digest else 0,
        kinds=(*KINDS[: _count(entry, "kinds")], *_added_kinds(entry)) if digest else (),
        rule=entry.get("keys", FIRST_DOT),
        notes=_notes(entry),
    )
    if shard.rule not in RULES:
        raise Refused(f"{name}: keys={shard.rule!r:.80} is none of {', '.join(RULES)}")
    if not isinstance(shard.stamp, str):
        raise Refused(f"{name}: stamp={shard.stamp!r}")
    least = ROW.itemsize * shard.samples
    if digest:
        least += HEADED.itemsize * shard.samples + MEMBER.itemsize * shard.others
    if shard.kept.length < least:
        raise Refused(f"{name}: {shard.samples} samples do not fit into {shard.kept.length} bytes")
    return shard


def _added_kinds(entry: dict[str, Any]) -> list[str]:
    """Kinds of tasks from outside that were looked for."""
    names = entry.get("added_kinds", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Refused(f"{entry['name']}: added_kinds={names!r:.80}")
    return names


def _notes(entry: dict[str, Any]) -> tuple[Note, ...]:
    """What an entry says to be not used; kinds of a newer package are passed over."""
    said = entry.get("not_used", {})
    if not isinstance(said, dict):
        raise Refused(f"{entry['name']}: not_used={said!r:.80}")
    notes = []
    for what, count_and_names in said.items():
        match count_and_names:
            case [int(count), *names] if all(isinstance(name, str) for name in names):
                notes.append(Note(what, count, tuple(names)))
            case _:
                raise Refused(f"{entry['name']}: not_used={said!r:.80}")
    return tuple(note for note in notes if note.what in WORDS)


def _count(entry: dict[str, Any], name: str) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise Refused(f"{entry['name']}: {name}={value!r} is not a count")
    return value


def _hash(entry: dict[str, Any], name: str, *, optional: bool = False) -> str:
    value = entry.get(name, "")
    if optional and value == "":
        return ""
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise Refused(f"{entry['name']}: {name}={value!r:.80} is not a hash")
    return value


def unlike_header(header: bytes, key: str, size: int, checksum: int) -> bool:
    """Whether the header before a member's content is not the one that was indexed.

    Args:
        header: the HEADER bytes before it.
        key: of its sample.
        size: of its content.
        checksum: as the index has it; -1: not known, then names are compared where a header has
            room for the whole name.
    """
    try:
        found = int(header[148:156].strip(b" \0") or b"-1", 8)
        if checksum >= 0:
            return found != checksum
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0]
        if header[156:157] not in b"LKS" and prefix and header[257:263] == b"ustar\0":
            name = prefix + b"/" + name
        if int(header[124:136].strip(b" \0") or b"-1", 8) != size:
            return True
    except ValueError:
        return True
    wanted = key.encode("utf-8", "surrogateescape") + b"."
    fits = key.isascii() and len(wanted) < _PLAIN_NAME
    return fits and not name.startswith(wanted)
