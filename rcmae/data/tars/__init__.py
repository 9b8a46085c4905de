"""What lies where in a tar, read from its headers alone.

`headers` walks through the members, `samples` groups them by keys and says what is not used,
`shard` is the part of an index table that describes a tar, `scanning` makes it. Images are then
read by offset, without a tar library."""

from rcmae.data.tars.headers import BrokenTar, not_a_tar
from rcmae.data.tars.kinds import KIND_OF_SUFFIX, KINDS, add_kind, suffix_of
from rcmae.data.tars.samples import (
    FIRST_DOT,
    IMAGE_SUFFIXES,
    LAST_DOT,
    LOST,
    RULES,
    Contents,
    Note,
    Place,
    image_suffix,
    together,
)
from rcmae.data.tars.scanning import Scan, is_no_tar, label_in, scan, scan_all
from rcmae.data.tars.shard import (
    HEADED,
    HEADER,
    MEMBER,
    NO_LABEL,
    ROW,
    Member,
    Shard,
    TablePart,
    entry_of,
    forget_table,
    hashes,
    shard_of,
    unlike_header,
)

__all__ = [
    "FIRST_DOT",
    "HEADED",
    "HEADER",
    "IMAGE_SUFFIXES",
    "KINDS",
    "KIND_OF_SUFFIX",
    "LAST_DOT",
    "LOST",
    "MEMBER",
    "NO_LABEL",
    "ROW",
    "RULES",
    "BrokenTar",
    "Contents",
    "Member",
    "Note",
    "Place",
    "Scan",
    "Shard",
    "TablePart",
    "add_kind",
    "entry_of",
    "forget_table",
    "hashes",
    "image_suffix",
    "is_no_tar",
    "label_in",
    "not_a_tar",
    "scan",
    "scan_all",
    "shard_of",
    "suffix_of",
    "together",
    "unlike_header",
]
