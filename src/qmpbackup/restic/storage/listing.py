# SPDX-License-Identifier: Apache-2.0
"""Listings of files, in bounded memory: what a server names is parsed while it comes, and kept in 40
bytes a file.

Who serves a repository needs no password to name millions of files that are not there. A listing of
100,000 packs is read in a quarter of a second.
"""

import codecs
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from json.decoder import JSONDecoder
from typing import Final

from qmpbackup.errors import StorageError
from qmpbackup.restic.storage.interface import Kind, is_name

_MOST_PACKS: Final = 3_000_000
"""With packs as restic makes them, 48 TiB; their names and lengths take 120 MB."""

_MOST_OTHERS: Final = 200_000

_LARGEST_SIZE: Final = (1 << 63) - 1
_RECORD = struct.Struct("<32sq")

_PIECE: Final = 64 << 10
_LARGEST_MEMBER: Final = 8192
"""Characters of one member of a list; restic's servers write some 100."""

_MOST_TEXT: Final = 512 << 20
"""Bytes of a listing in all, whatever stands in it."""

_ENDS: Final = {"{": "},", '"': '",'}
"""How members end that are followed by another, by how they begin."""

_SPACE = re.compile(r"[ \t\r\n]*")


class Listing:
    """Names of files of one kind, with their lengths; -1 where a server does not tell."""

    def __init__(self, kind: Kind, place: str) -> None:
        self._kind = kind
        self._place = place
        self._left = _MOST_PACKS if kind is Kind.DATA else _MOST_OTHERS
        self._records = bytearray()

    def add(self, name: str, size: int) -> None:
        """Take in a file; what is not named as files of a repository are is left out.

        Raises:
            StorageError: there are more than any repository has, or a length is none.
        """
        self._left -= 1
        if self._left < 0:
            raise StorageError(
                f"{self._place} lists more {self._kind} than a repository can have.",
                "See what this server is.",
            )
        if not -1 <= size <= _LARGEST_SIZE:
            raise StorageError(f"{self._place} does not list {self._kind} as it should.")
        if is_name(name):
            self._records += _RECORD.pack(bytes.fromhex(name), size)

    @classmethod
    def of(cls, kind: Kind, place: str, entries: Iterator[tuple[str, int]]) -> "Listing":
        """All of these entries; of a listing that nobody has begun to walk, itself."""
        if isinstance(entries, Walk) and not entries.is_begun:
            return entries.listing
        listing = cls(kind, place)
        for name, size in entries:
            listing.add(name, size)
        return listing

    @property
    def has_sizes(self) -> bool:
        """Whether the length of each file is known."""
        return all(size >= 0 for _, size in _RECORD.iter_unpack(self._records))

    def __iter__(self) -> "Walk":
        return Walk(self, _RECORD.iter_unpack(self._records))


class Walk(Iterator[tuple[str, int]]):
    """A way through a listing, which can be had as a whole as long as it is not begun."""

    def __init__(self, listing: Listing, records: Iterator[tuple[bytes, int]]) -> None:
        self.listing = listing
        self.is_begun = False
        self._records = records

    def __next__(self) -> tuple[str, int]:
        self.is_begun = True
        name, size = next(self._records)
        return name.hex(), size


def members(read: Callable[[int], bytes]) -> Iterator[object]:
    """The members of a JSON list that is read piece by piece; `null` is an empty list.

    Raises:
        ValueError: this is no list, or a member of it is larger than it may be.
    """
    text = _Text(read)
    if text.take("["):
        if not text.take("]"):
            yield from text.values()
            while not text.take("]"):
                text.require(",")
                yield from text.values()
    else:
        for letter in "null":
            text.require(letter)
    text.require("")


class _Text:
    """A text of which there is always more than one member at hand, until its end."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._decoder = JSONDecoder()
        self._text = ""
        self._at = 0
        self._taken = 0
        self._is_over = False
        self._is_plain = True

    def take(self, character: str) -> bool:
        """Whether this character comes next; it is passed over."""
        self._fill()
        if self._text[self._at : self._at + 1] != character:
            return False
        self._at += len(character)
        return True

    def require(self, character: str) -> None:
        """Pass over a character; an empty one is the end."""
        if not self.take(character):
            raise ValueError("it is no list")

    def values(self) -> list[object]:
        """The values that come next, as many as are at hand, and one at least."""
        self._fill()
        mark = _ENDS.get(self._text[self._at : self._at + 1], "")
        end = self._text.rfind(mark, self._at) + 1 if mark else 0
        if end and self._is_plain:
            try:
                # What begins where a value does, and reads as whole values, is these.
                found: list[object] = self._decoder.decode(f"[{self._text[self._at : end]}]")
            except (ValueError, RecursionError):
                self._is_plain = False  # until there is more
            else:
                self._at = end
                return found
        return [self._value()]

    def _value(self) -> object:
        try:
            value, end = self._decoder.raw_decode(self._text, self._at)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if end - self._at > _LARGEST_MEMBER:
            raise ValueError("a member of it is too large")
        self._at = end
        return value

    def _fill(self) -> None:
        """Pass over space, and have the next member at hand."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._is_over or len(self._text) - self._at > _LARGEST_MEMBER:
                return
            piece = self._read(_PIECE)
            self._taken += len(piece)
            if self._taken > _MOST_TEXT:
                raise ValueError("it has no end")
            self._is_over = not piece
            try:
                self._text = self._text[self._at :] + self._decode(piece, not piece)
            except UnicodeDecodeError as error:
                raise ValueError("it is no text") from error
            self._at = 0
            self._is_plain = True


def sized(entries: Iterable[object]) -> Iterator[tuple[str, int]]:
    """Names and lengths, from a listing of REST servers of the second version.

    Raises:
        ValueError: a member is none.
    """
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError("a member is no object")  # noqa: TRY004 - the document's fault
        name, size = entry.get("name"), entry.get("size")
        if not isinstance(name, str) or type(size) is not int:
            raise ValueError("a member has no name or no size")
        yield name, size


def unsized(entries: Iterable[object]) -> Iterator[tuple[str, int]]:
    """Names alone, from one of the first version.

    Raises:
        ValueError: a member is none.
    """
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError("a member is no name")  # noqa: TRY004 - the document's fault
        yield entry, -1
