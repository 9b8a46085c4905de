"""What an offline run of Weights & Biases wrote: its library has no way to read that back.

A file is 7 bytes of its own, then LevelDB's log format: blocks of 32 KiB, in them pieces of
records, each with a checksum, a length and whether it begins or ends a record
(github.com/google/leveldb, doc/log_format.md).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_MAGIC = b":W&B" + struct.pack("<H", 0xBEE1)
_HEADER = len(_MAGIC) + 1  # and a version
_BLOCK = 1 << 15
_LAST_BLOCKS = 8  # at a file's end, in which its last row is likely to be
_PIECE = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class Row(NamedTuple):
    """What was logged of a step."""

    step: int
    values: dict[str, Any]


def rows(path: Path) -> Iterator[Row]:
    """The rows of a `.wandb` file in order, up to a torn end. Raises OSError."""
    content = path.read_bytes()
    if content.startswith(_MAGIC):
        yield from _rows(content, _HEADER)


def last_step(path: Path) -> int:
    """The newest step of a `.wandb` file; -1: it has none. Raises OSError."""
    start = (path.stat().st_size // _BLOCK - _LAST_BLOCKS) * _BLOCK
    if start > 0:
        with path.open("rb") as file:
            file.seek(start)
            found = [row.step for row in _rows(file.read(), 0)]
        if found:
            return found[-1]
    return max([-1, *(row.step for row in rows(path))])


def _rows(content: bytes, at: int) -> Iterator[Row]:
    """The rows of a file, or of its end that begins with a block."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _records(content, at):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            yield Row(record.history.step.num, values)


def _records(content: bytes, at: int) -> Iterator[bytes]:
    """The records that begin at this offset or beyond."""
    record = None  # of the pieces since its first one
    while True:
        left = _BLOCK - at % _BLOCK
        if left < _PIECE.size:  # too little for a piece: zeros
            at += left
        if at + _PIECE.size > len(content):
            return
        _, length, kind = _PIECE.unpack_from(content, at)
        at += _PIECE.size
        if at + length > len(content) or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        piece = content[at : at + length]
        at += length
        if kind in (_FULL, _FIRST):
            record = piece
        elif record is not None:
            record += piece
        if kind in (_FULL, _LAST) and record is not None:
            yield record
