# SPDX-License-Identifier: Apache-2.0
"""Tar archives (pax) as the appliance writes them, read without belief: all that is kept is bounded.

GNU tar writes them there, of a guest's file system; what took that kernel over could write anything. So
names lead downwards alone, headers have a largest size, and nothing else is understood than what GNU tar
writes of files, folders, links and devices: ustar headers, pax records, and its sparse format 1.0.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.errors import UsageError, VmError

BLOCK = 512
_LARGEST_RECORDS = 4 * 1024 * 1024
_LARGEST_MAP = 16 * 1024 * 1024
_MOST_XATTRS = 1000
_PIECE = 256 * 1024
_LARGEST_NUMBER = 2**63 - 1

FILE, HARD_LINK, SYMBOLIC_LINK, FOLDER = b"0", b"1", b"2", b"5"
_KINDS = frozenset({FILE, HARD_LINK, SYMBOLIC_LINK, b"3", b"4", FOLDER, b"6"})
_XATTR = b"SCHILY.xattr."

Parts = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """One file of an archive. `parts` is where it is; of a hard link, `linked` is where its file is, of a
    symbolic link, `target` is what it says.

    `stored` bytes of it are in the archive, after `head`; `extents` says where they belong in a file
    with holes, as (offset, length).
    """

    kind: bytes
    parts: Parts
    mode: int
    user: int
    group: int
    size: int
    time: float
    stored: int
    head: bytes
    linked: Parts = ()
    target: bytes = b""
    extents: Sequence[tuple[int, int]] | None = None
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


class Archive:
    """An archive that is read once, from its beginning to its end."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._kept = b""
        self._left = 0
        self._padding = 0

    def members(self) -> Iterator[ArchiveMember]:
        """One member after the other; what of its data is not read is passed over.

        Raises:
            VmError: it is not what GNU tar writes.
        """
        while True:
            for _ in self.data():
                pass
            head = self._exactly(BLOCK)
            if not head.strip(b"\0"):
                for _ in self._pieces:  # zeros up to the end
                    pass
                return
            yield self._member(head)

    def data(self) -> Iterator[bytes]:
        """What is stored of the member that came last."""
        while self._left:
            piece = self._some(min(self._left, _PIECE))
            self._left -= len(piece)
            if not self._left:
                self._exactly(self._padding)
            yield piece

    def _member(self, head: bytes) -> ArchiveMember:
        records: dict[bytes, bytes] = {}
        whole = head
        while head[156:157] in {b"x", b"g"}:
            size = _number(head[124:136])
            if size > _LARGEST_RECORDS:
                raise _strange()
            said = self._exactly(size + -size % BLOCK)
            if head[156:157] == b"x":
                records = _records(said[:size])
            head = self._exactly(BLOCK)
            whole += said + head
        return self._described(head, records, whole)

    def _described(
        self, head: bytes, records: Mapping[bytes, bytes], whole: bytes
    ) -> ArchiveMember:
        kind = head[156:157] if head[156:157] != b"\0" else FILE
        if kind not in _KINDS or _number(head[148:156]) != _sum(head):
            raise _strange()
        name = records.get(b"path", _joined(head[345:500], head[:100]))
        linked = records.get(b"linkpath", head[157:257].partition(b"\0")[0])
        stored = _decimal(records[b"size"]) if b"size" in records else _number(head[124:136])
        stored = stored if kind == FILE else 0
        self._left, self._padding = stored, -stored % BLOCK
        size, extents = stored, None
        if b"GNU.sparse.major" in records:
            if (records[b"GNU.sparse.major"], records.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                raise _strange()
            name = records[b"GNU.sparse.name"]
            size = _decimal(records.get(b"GNU.sparse.realsize", b""))
            extents, said = self._extents(size)
            whole += said
            stored = self._left
        return ArchiveMember(
            kind=kind,
            parts=_parts(name),
            mode=_number(head[100:108]) & 0o7777,
            user=_decimal(records[b"uid"]) if b"uid" in records else _number(head[108:116]),
            group=_decimal(records[b"gid"]) if b"gid" in records else _number(head[116:124]),
            size=size,
            time=_time(records.get(b"mtime"), head[136:148]),
            stored=stored,
            head=whole,
            linked=_parts(linked) if kind == HARD_LINK else (),
            target=linked if kind == SYMBOLIC_LINK else b"",
            extents=extents,
            xattrs=_xattrs(records),
        )

    def _extents(self, size: int) -> tuple[Sequence[tuple[int, int]], bytes]:
        """Where the data belongs, which the data begins with: numbers, each on its line."""
        said = b""

        def numbers() -> Iterator[int]:
            nonlocal said
            rest = b""
            while True:
                while b"\n" not in rest:
                    if self._left < BLOCK or len(said) > _LARGEST_MAP:
                        raise _strange()
                    block = self._exactly(BLOCK)
                    self._left -= BLOCK
                    said += block
                    rest += block
                line, _, rest = rest.partition(b"\n")
                yield _decimal(line)

        found = numbers()
        extents = [(next(found), next(found)) for _ in range(next(found))]
        at = 0
        for offset, length in extents:
            if offset < at or offset + length > size:
                raise _strange()
            at = offset + length
        if sum(length for _, length in extents) != self._left:
            raise _strange()
        return extents, said

    def _some(self, most: int) -> bytes:
        """From one byte to so many."""
        while not self._kept:
            self._kept = self._next()
        found, self._kept = self._kept[:most], self._kept[most:]
        return found

    def _exactly(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            parts.append(self._some(missing))
            missing -= len(parts[-1])
        return b"".join(parts)

    def _next(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise VmError("The appliance ends an archive before its end.")


def checked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """An archive as it came, once each of its headers has been understood.

    Raises:
        VmError: one is not what GNU tar writes, or names something else than what is below.
    """
    archive = Archive(pieces)
    for member in archive.members():
        yield member.head
        yield from archive.data()
        if member.stored % BLOCK:
            yield b"\0" * (-member.stored % BLOCK)
    yield b"\0" * (2 * BLOCK)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A new file to write to, which is gone again if the block fails.

    Raises:
        UsageError: it is there.
    """
    with storage_errors(f"write {path}"):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise UsageError(f"{path} is there.", "Choose another name.") from None
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)


# What headers say


def _parts(name: bytes) -> Parts:
    """The names on a path that leads downwards; none for the top.

    Raises:
        VmError: it leads elsewhere.
    """
    parts = tuple(each for each in name.split(b"/") if each not in {b"", b"."})
    if name.startswith(b"/") or b".." in parts or b"\0" in name:
        raise _strange()
    return parts


def _joined(prefix: bytes, name: bytes) -> bytes:
    above, below = prefix.partition(b"\0")[0], name.partition(b"\0")[0]
    return b"/".join([above, below]) if above else below


def _number(text: bytes) -> int:
    """A number of a header: octal, or GNU's binary form."""
    if text[0] & 0x80:
        value = int.from_bytes(bytes([text[0] & 0x7F]) + text[1:], "big")
        if text[0] & 0x40:
            return 0  # a time before 1970; no size
        return _bounded(value)
    try:
        return _bounded(int(text.strip(b" \0") or b"0", 8))
    except ValueError as error:
        raise _strange() from error


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise _strange()
    return _bounded(int(text))


def _bounded(value: int) -> int:
    if not 0 <= value <= _LARGEST_NUMBER:
        raise _strange()
    return value


def _time(record: bytes | None, field_: bytes) -> float:
    try:
        return float(record) if record is not None else float(_number(field_))
    except ValueError as error:
        raise _strange() from error


def _sum(head: bytes) -> int:
    return sum(head[:148]) + 8 * ord(" ") + sum(head[156:])


def _records(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE` and a line feed, again and again; the length counts all of it."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 20].partition(b" ")[0]
        length = _decimal(digits)
        line = data[at + len(digits) + 1 : at + length]
        key, equals, value = line[:-1].partition(b"=")
        if length <= len(digits) + 1 or at + length > len(data) or not equals or line[-1:] != b"\n":
            raise _strange()
        found[key] = value
        at += length
    return found


def _xattrs(records: Mapping[bytes, bytes]) -> dict[str, bytes]:
    found = {
        os.fsdecode(key.removeprefix(_XATTR)): value
        for key, value in records.items()
        if key.startswith(_XATTR)
    }
    if len(found) > _MOST_XATTRS:
        raise _strange()
    return found


def _strange() -> VmError:
    return VmError(
        "The appliance writes no archive as GNU tar does; what it reads may have got the better of it.",
        "Nothing of it was believed.",
    )
