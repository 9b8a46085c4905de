"""The members of a tar from their headers alone: ustar, GNU and pax, without a tar library.

Nothing that a header says is believed: a size is never negative and never leads out of the file, so
the walk only goes forward and ends. Members behind an end mark (tars joined with `cat`) are given
as all others. tarfile stops at the first end mark, goes where a negative size sends it, and reads
any header whole into memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from rcmae.errors import Refused

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")  # types of files
HARD_LINK, SYMBOLIC_LINK, FOLDER, SPARSE = b"1", b"2", b"5", b"S"
_NO_CONTENT = b"123456"  # types that have none, whatever their size field says
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"L", b"K", b"xX", b"g"
_LONGEST = 2**20  # bytes of an extended header: names, and what tools put beside them
_ZEROS_AT_ONCE = 2**16
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_RECORD = re.compile(rb"(\d{1,20}) ")
_SPARSE_KEYS = (b"GNU.sparse.map", b"GNU.sparse.major", b"GNU.sparse.size", b"SCHILY.realsize")


class BrokenTar(Refused):
    """A file is not a tar, or stops being one; the message says where."""


class Header(NamedTuple):
    """A member of a tar."""

    name: str
    kind: bytes  # the type, a byte: of REGULAR, HARD_LINK, ...; SPARSE for every form of these
    offset: int  # of its content, in bytes from the start of the tar
    size: int
    checksum: int  # as the header block right before its content has it
    link: str  # what a link leads to


class Walk:
    """The members of an open tar, in its order.

    After the last one the other fields say how the tar ends."""

    def __init__(self, file: int) -> None:
        """Walk through the file of a descriptor, whose position does not matter."""
        self._file = file
        self.size = os.fstat(file).st_size
        self.is_ended = False  # an end mark was met
        self.behind = 0  # members behind an end mark
        self.junk = 0  # bytes behind an end mark that are not part of the tar

    def __iter__(self) -> Iterator[Header]:
        """Raises BrokenTar where it breaks off, after the members before that."""
        self.is_ended = False
        self.behind = self.junk = at = 0
        of_all: dict[bytes, bytes] = {}
        while True:
            block = self._block(at)
            if not block.strip(b"\0"):
                self.is_ended = self.is_ended or len(block) == BLOCK
                at = self._after_zeros(at)
                if at >= self.size:
                    break
                try:
                    _checksum(self._block(at), at)
                except BrokenTar:
                    self.junk = self.size - at
                    return
                continue
            header, at = self._member(block, at, of_all)
            self.behind += self.is_ended
            yield header
            if at > self.size:
                raise BrokenTar(f"ends within {header.name!r:.200}")
        if not self.size:
            raise BrokenTar("empty file")
        if not self.is_ended:
            # one that is cut between members looks whole otherwise
            raise BrokenTar("no end mark: it is cut short")

    def _block(self, at: int) -> bytes:
        return os.pread(self._file, BLOCK, at)

    def _after_zeros(self, at: int) -> int:
        """Where the first block from there on that is not of zeros begins; the end if none is."""
        while at < self.size:
            data = os.pread(self._file, _ZEROS_AT_ONCE, at)
            zeros = len(data) - len(data.lstrip(b"\0"))
            if zeros < len(data) or not data:
                return at + zeros // BLOCK * BLOCK if data else self.size
            at += len(data)
        return self.size

    def _member(self, block: bytes, at: int, of_all: dict[bytes, bytes]) -> tuple[Header, int]:
        """(the member whose headers begin there, where the next one begins)."""
        long_name = long_link = b""
        own: dict[bytes, bytes] = {}
        while (kind := block[156:157]) and kind in b"LKxXg":
            _checksum(block, at)
            size = _number(block[124:136], "size", at)
            if size > _LONGEST:
                raise BrokenTar(f"the header at byte {at} has {size} bytes, {_LONGEST} at most")
            at += BLOCK
            content = os.pread(self._file, size, at)
            if len(content) < size:
                raise BrokenTar(f"ends in the header at byte {at - BLOCK}")
            if kind == _LONG_NAME:
                long_name = content.partition(b"\0")[0]
            elif kind == _LONG_LINK:
                long_link = content.partition(b"\0")[0]
            else:
                (of_all if kind == _PAX_OF_ALL else own).update(_records(content, at))
            at += _rounded(size)
            block = self._block(at)
            if not block.strip(b"\0"):
                raise BrokenTar(f"a header at byte {at} is missing behind an extended one")
        checksum = _checksum(block, at)
        said = of_all | own if of_all or own else own
        name = said.get(b"path") or long_name or _name(block, kind)
        link = said.get(b"linkpath") or long_link or block[157:257].partition(b"\0")[0]
        size = _number(block[124:136], "size", at)
        if b"size" in said:
            size = _decimal(said[b"size"], at)
        at += BLOCK
        if kind == b"\0" and name.endswith(b"/"):
            kind = FOLDER  # as tars of before 1988 have it
        elif kind == SPARSE:
            at = self._after_map(block, at)
        elif kind in REGULAR and any(key in said for key in _SPARSE_KEYS):
            name = said.get(b"GNU.sparse.name", name)
            kind = SPARSE
        if kind in _NO_CONTENT and not (kind == HARD_LINK and size and self._has_content(at)):
            size = 0
        elif kind == HARD_LINK:
            kind = b"0"  # pax may store a link's bytes once more
        header = Header(_text(name), kind, at, size, checksum, _text(link))
        return header, at + _rounded(size)

    def _after_map(self, block: bytes, at: int) -> int:
        """Where the content of an old GNU sparse file begins, behind its map."""
        is_more = block[482:483]
        while is_more.strip(b"\0"):
            block = self._block(at)
            if len(block) < BLOCK:
                raise BrokenTar(f"ends in the map of a sparse file at byte {at}")
            is_more = block[504:505]
            at += BLOCK
        return at

    def _has_content(self, at: int) -> bool:
        """Whether what follows a link is not a header: some archivers store the bytes, too."""
        block = self._block(at)
        if not block.strip(b"\0"):
            return False
        try:
            _checksum(block, at)
        except BrokenTar:
            return True
        return False


def not_a_tar(block: bytes) -> str | None:
    """Why a file that begins with this block cannot be a tar that is read by offset; else None."""
    if block.startswith(_COMPRESSED):
        return "is compressed; images are read by offset, so unpack it to a plain tar"
    try:
        if block:
            _checksum(block, 0)
    except BrokenTar:
        return "is not a tar file" if any(block) else "holds no files"
    return None


def _checksum(block: bytes, at: int) -> int:
    """The checksum that a header has. Raises BrokenTar where it is not that of the header."""
    if len(block) < BLOCK:
        raise BrokenTar(f"ends in the header at byte {at}")
    told = _number(block[148:156], "checksum", at)
    others = block[:148] + block[156:]
    unsigned = sum(others) + 256
    # some archivers of old add the bytes as signed ones
    if told != unsigned and told != unsigned - 256 * sum(byte > 127 for byte in others):
        raise BrokenTar(f"no header at byte {at}")
    return told


def _number(field: bytes, what: str, at: int) -> int:
    """A number of a header, octal or in base 256. Raises BrokenTar where it is none, or < 0."""
    if field[0] in (0o200, 0o377):
        value = int.from_bytes(field[1:], "big", signed=field[0] == 0o377)
    else:
        digits = field.partition(b"\0")[0].strip() or b"0"
        value = int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
    if value < 0 or value >= 2**63:
        raise BrokenTar(f"the header at byte {at} has a {what} of {field!r}")
    return value


def _decimal(digits: bytes, at: int) -> int:
    """A size in a pax header. Raises BrokenTar."""
    if not digits.isdigit() or len(digits) > 18:
        raise BrokenTar(f"the header at byte {at} has a size of {digits!r:.40}")
    return int(digits)


def _records(content: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """The records `LENGTH KEY=VALUE` of a pax header. Raises BrokenTar."""
    start = 0
    while start < len(content) and content[start]:
        length = _RECORD.match(content, start)
        end = start + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(content):
            raise BrokenTar(f"the pax header at byte {at} is damaged")
        key, is_there, value = content[length.end() : end - 1].partition(b"=")
        if not is_there:
            raise BrokenTar(f"the pax header at byte {at} is damaged")
        yield key, value
        start = end


def _name(block: bytes, kind: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and kind != SPARSE else name


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
