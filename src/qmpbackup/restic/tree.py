# SPDX-License-Identifier: Apache-2.0
"""Trees: the listing of one folder, as JSON (doc/design.rst, "Trees and Data").

A tree's id is the hash of its JSON, so two writers must put the same listing down alike: nodes in
the order of their names' bytes, members in restic's order, a newline at the end.

The content of a disk of a terabyte is a million ids, 67 bytes each in JSON. They go from and to one
`bytes` of 32 each in blocks, and never become a million objects. Knows nothing of how blobs are
stored.
"""

import binascii
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from qmpbackup.restic import gojson

ID: Final = 32
"""Bytes of an id."""

_QUOTED_ID: Final = 2 * ID + 3
"""Bytes of an id in a list of them, with its quotes and the comma behind it."""

_IDS_AT_ONCE: Final = 16_384
_FIRST_IDS: Final = 16

_LARGEST_REST: Final = 16 << 20
"""Bytes of a tree's JSON beside its lists of ids that are believed: some 25,000 nodes."""

_CONTENT: Final = b'"content":['

_ESCAPES: Final = {
    "a": b"\a", "b": b"\b", "f": b"\f", "n": b"\n", "r": b"\r", "t": b"\t", "v": b"\v",
    "\\": b"\\", '"': b'"',
}  # fmt: skip
_UNESCAPES: Final = {value.decode(): "\\" + key for key, value in _ESCAPES.items()}
_ESCAPED = re.compile(
    r'\\(?:([abfnrtv\\"])|x([0-9a-fA-F]{2})|([0-7]{3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))'
)


@dataclass(frozen=True, slots=True)
class Node:
    """One file, folder, or what else is in a folder.

    `mode` is Go's os.FileMode: the nine bits of permissions, and the kind in the upper bits (folder:
    1 << 31). `content` is the ids of a file's blobs one after the other, `subtree` a folder's tree.
    Names are of the file system: bytes that are no UTF-8 stand in them as surrogates (PEP 383).
    """

    name: str
    type: str
    mode: int
    mtime: datetime
    atime: datetime
    ctime: datetime
    uid: int = 0
    gid: int = 0
    user: str = ""
    group: str = ""
    inode: int = 0
    device_id: int = 0
    links: int = 0
    size: int = 0
    content: bytes = b""
    subtree: bytes | None = None
    link_target: str = ""


def encode(nodes: Iterable[Node]) -> Iterator[bytes]:
    """A tree's JSON in blocks of a megabyte at most.

    Raises:
        ValueError: a name is none, or there twice; or a content has not whole ids.
    """
    ordered = sorted(nodes, key=lambda node: node.name.encode(errors="surrogateescape"))
    names = [node.name for node in ordered]
    if len(set(names)) != len(names) or not all(map(_is_name, names)):
        raise ValueError("names in a folder must be names, and differ")
    yield b'{"nodes":['
    for number, node in enumerate(ordered):
        yield b"," if number else b""
        yield from _encode_node(node)
    yield b"]}\n"


def _encode_node(node: Node) -> Iterator[bytes]:
    if len(node.content) % ID or len(node.subtree or bytes(ID)) != ID:
        raise ValueError(f"{node.name!r} has no whole ids")
    always = {"name", "type", "mtime", "atime", "ctime", "uid", "gid"}
    members: dict[str, object] = {
        "name": _quote(node.name),
        "type": node.type,
        "mode": node.mode,
        "mtime": node.mtime,
        "atime": node.atime,
        "ctime": node.ctime,
        "uid": node.uid,
        "gid": node.gid,
        "user": node.user,
        "group": node.group,
        "inode": node.inode,
        "device_id": node.device_id,
        "size": node.size,
        "links": node.links,
        "linktarget": node.link_target,
    }
    head = gojson.dump({k: v for k, v in members.items() if v or k in always})
    yield head.removesuffix("}").encode() + b',"content":'
    if node.type == "file" or node.content:
        yield b"["
        yield from _encode_ids(node.content)
        yield b"]"
    else:
        yield b"null"
    if node.subtree is not None:
        yield f',"subtree":"{node.subtree.hex()}"'.encode()
    yield b"}"


def _encode_ids(content: bytes) -> Iterator[bytes]:
    step = _IDS_AT_ONCE * ID
    last, encoded = b"", b""
    for start in range(0, len(content), step):
        block = content[start : start + step]
        if block != last:  # a disk that holds little has a run of one id
            digits = block.hex(",", ID).replace(",", '","').encode()
            last, encoded = block, b'%s"%s"' % (b"," if start else b"", digits)
            if not start:
                last = b""  # no other block begins without a comma
        yield encoded


def parse(blocks: Iterable[bytes], what: str = "A tree") -> list[Node]:
    """The nodes of a tree that comes in blocks, of which no more than one is kept.

    Raises:
        DamagedError: this is none.
    """
    lists = _Lists()
    for block in blocks:
        lists.feed(block)
        if lists.rest > _LARGEST_REST:
            raise gojson.damaged(what, "it is too large")
    members = gojson.load(lists.finish(), what)
    nodes = members.get("nodes")
    if nodes is None:
        nodes = []
    if not isinstance(nodes, list):
        raise gojson.damaged(what, "its nodes are no list")
    found = [_node(each, what, lists) for each in nodes]
    if len({node.name for node in found}) != len(found):
        raise gojson.damaged(what, "it has a name twice")
    return found


class _Lists:
    """Takes the lists of ids out of a tree's JSON, and leaves a mark with a number for each.

    A list that does not stand there as restic writes it is left where it is, for the general way.
    """

    def __init__(self) -> None:
        # Nobody who wrote the tree can have known this word, so it stands for what we put there.
        self.mark = os.urandom(16).hex()
        self.found: list[bytes] = []
        self._text = bytearray()
        self._rest = bytearray()
        self._list: list[bytes] = []
        self._count = 0
        self._in_list = False
        self._last: tuple[bytes, bytes] = (b"", b"")
        """What was read of a list, and its ids: in a long run of one id, all is the same."""

    @property
    def rest(self) -> int:
        """Bytes so far that are no lists of ids."""
        return len(self._text) + len(self._rest)

    def feed(self, block: bytes) -> None:
        """The next block."""
        self._rest += block
        while self._next_ids() if self._in_list else self._next_list():
            pass

    def finish(self) -> bytes:
        """The JSON without the lists."""
        if self._in_list:
            self._put_back()
        self._text += self._rest
        return bytes(self._text)

    def _next_list(self) -> bool:
        """Go to where a list begins; false where more of the JSON is needed for that."""
        at = self._rest.find(_CONTENT)
        if at < 0:
            self._pass(max(0, len(self._rest) - len(_CONTENT) + 1))
            return False
        before = self._rest[at - 1 : at] if at else self._text[-1:]
        self._pass(at + len(_CONTENT))
        # The second quote is not escaped, so it ends a string: a member's name, unless the first
        # one is escaped.
        if before != b"\\":
            self._text.pop()
            self._in_list = True
        return True

    def _next_ids(self) -> bool:
        """Read ids of the list; false where more of the JSON is needed for that."""
        if not self._list and self._rest[:1] == b"]":
            del self._rest[0]
            self._end()
            return True
        # No more than there have been: what only begins like a list must not be searched for long.
        at_once = min(_FIRST_IDS + self._count, _IDS_AT_ONCE)
        size = min(len(self._rest) // _QUOTED_ID, at_once) * _QUOTED_ID
        end = self._rest.find(b"]", 0, size)
        is_last = end >= 0
        if is_last:
            size = end + 1
        if not size:
            return False
        ids = None if size % _QUOTED_ID else self._ids_of(bytes(self._rest[:size]), is_last=is_last)
        if ids is None:
            self._put_back()
            return True
        self._list.append(ids)
        self._count += len(ids) // ID
        del self._rest[:size]
        if is_last:
            self._end()
        return True

    def _ids_of(self, block: bytes, *, is_last: bool) -> bytes | None:
        known, ids = self._last
        if known.startswith(block):
            return ids[: len(block) // _QUOTED_ID * ID]
        found = _decode_block(block, is_last=is_last)
        if found is not None:
            self._last = (block, found)
        return found

    def _end(self) -> None:
        self._text += f'"{self.mark}{len(self.found)}"'.encode()
        self.found.append(b"".join(self._list))
        self._list, self._count, self._in_list = [], 0, False

    def _put_back(self) -> None:
        """Leave the list where it is: what was read of it, and what follows."""
        self._text += b"["
        self._text += b"".join(_encode_ids(b"".join(self._list)))
        self._text += b"," if self._list else b""
        self._list, self._count, self._in_list = [], 0, False

    def _pass(self, size: int) -> None:
        self._text += self._rest[:size]
        del self._rest[:size]


def _decode_block(block: bytes, *, is_last: bool) -> bytes | None:
    count = len(block) // _QUOTED_ID
    quotes = b'"' * count
    commas = b"," * (count - 1) + (b"]" if is_last else b",")
    framed = (
        block[0::_QUOTED_ID] == quotes
        and block[_QUOTED_ID - 2 :: _QUOTED_ID] == quotes
        and block[_QUOTED_ID - 1 :: _QUOTED_ID] == commas
    )
    if not framed:
        return None
    try:
        ids = binascii.unhexlify(block.translate(None, b'",]'))
    except ValueError:
        return None
    return ids if len(ids) == count * ID else None


def _node(value: object, what: str, lists: _Lists) -> Node:
    if not isinstance(value, dict):
        raise gojson.damaged(what, "a node is no object")
    members = gojson.Members(value, what)
    name = _unquote(members.string("name"))
    if name is None or not _is_name(name):
        raise gojson.damaged(what, "a name is none")
    what = f"{what}'s node {name!r}"
    members = gojson.Members(value, what)
    return Node(
        name=name,
        type=members.string("type"),
        mode=members.number("mode", gojson.UINT32),
        mtime=members.time("mtime"),
        atime=members.time("atime"),
        ctime=members.time("ctime"),
        uid=members.number("uid", gojson.UINT32),
        gid=members.number("gid", gojson.UINT32),
        user=members.string("user"),
        group=members.string("group"),
        inode=members.number("inode"),
        device_id=members.number("device_id"),
        links=members.number("links"),
        size=members.number("size"),
        content=_content(value.get("content"), what, lists),
        subtree=members.id("subtree"),
        link_target=members.string("linktarget"),
    )


def _content(value: object, what: str, lists: _Lists) -> bytes:
    if value is None:
        return b""
    if isinstance(value, str) and value.startswith(lists.mark):
        return lists.found[int(value.removeprefix(lists.mark))]
    if not isinstance(value, list):
        raise gojson.damaged(what, "its content is no list")
    ids = [gojson.parse_id(each) if isinstance(each, str) else None for each in value]
    whole = [each for each in ids if each is not None]
    if len(whole) != len(ids):
        raise gojson.damaged(what, "its content is no list of ids")
    return b"".join(whole)


def _is_name(name: str) -> bool:
    """Whether a file can have this name: what is none must never become part of a path."""
    return name not in {"", ".", ".."} and not {"/", "\0"} & set(name)


def _quote(name: str) -> str:
    """A name as Go's strconv.Quote puts it between the quotes."""
    if name.isprintable() and not {"\\", '"'} & set(name):
        return name
    return "".join(map(_quote_character, name))


def _quote_character(character: str) -> str:
    code = ord(character)
    if character in _UNESCAPES:
        return _UNESCAPES[character]
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _unquote(text: str) -> str | None:
    """The name that Go's strconv.Unquote reads; None where it reads none."""
    if "\\" not in text:
        return None if '"' in text or "\n" in text else text
    parts: list[bytes] = []
    done = 0
    while (at := text.find("\\", done)) >= 0:
        match = _ESCAPED.match(text, at)
        piece = _unescaped(match) if match else None
        if match is None or piece is None or '"' in text[done:at] or "\n" in text[done:at]:
            return None
        parts += (text[done:at].encode(errors="surrogateescape"), piece)
        done = match.end()
    if '"' in text[done:] or "\n" in text[done:]:
        return None
    parts.append(text[done:].encode(errors="surrogateescape"))
    return b"".join(parts).decode(errors="surrogateescape")


def _unescaped(match: re.Match[str]) -> bytes | None:
    simple, byte, octal, short, long = match.groups()
    if simple:
        return _ESCAPES[simple]
    if byte or octal:
        value = int(byte, 16) if byte else int(octal, 8)
        return bytes([value]) if value < 256 else None
    try:
        return chr(int(short or long, 16)).encode()
    except (ValueError, OverflowError):  # beyond Unicode, or half of a pair
        return None
