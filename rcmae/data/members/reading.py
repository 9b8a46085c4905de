"""The bytes of a sample's image and other members, each found by the header before it."""

from __future__ import annotations

from collections.abc import Sequence

from rcmae.data.cache import Reader
from rcmae.data.index import Sample, ShardIndex
from rcmae.data.sources import indexing, redacted
from rcmae.data.tars import HEADER, unlike_header
from rcmae.data.transforms import BadImage


def image_bytes(reader: Reader, sample: Sample) -> bytes:
    """The encoded image of a sample, read with the tar header before it.

    Raises:
        BadImage: the shard ends before it, or another member lies there than was indexed.
        OSError: the shard is gone or cannot be had.
    """
    if sample.offset < HEADER:
        raise BadImage(f"its index says byte {sample.offset}, where a tar has a header")
    data = reader.read(sample.shard, sample.offset - HEADER, HEADER + sample.size)
    if len(data) < HEADER + sample.size:
        raise BadImage(f"only {max(0, len(data) - HEADER)} of its {sample.size} bytes are there")
    if unlike_header(data[:HEADER], sample.key, sample.size, sample.checksum):
        raise BadImage(
            f"{redacted(sample.path)} is not the tar that was indexed: another member lies there; "
            f"run {indexing(sample.path)}"
        )
    return data[HEADER:]


def member_bytes(
    reader: Reader,
    index: ShardIndex,
    number: int,
    kinds: Sequence[str],
    optional: Sequence[str] = (),
) -> dict[str, bytes]:
    """Kind -> bytes of some members of a sample, each read with the tar header before it.

    Those of an `optional` kind are left out where the sample has none.

    Raises:
        BadImage: one is missing, cut short, or not what was indexed.
        OSError: the shard is gone or cannot be had.
    """
    sample = index[number]
    there = {member.kind: member for member in index.members(number)}
    content = {}
    for kind in (*kinds, *optional):
        member = there.get(kind)
        if member is None and kind in optional:
            continue
        if member is None:
            raise BadImage(f"it has no {kind}")
        placed = sample._replace(offset=member.offset, size=member.size, checksum=member.checksum)
        content[kind] = image_bytes(reader, placed)
    return content
