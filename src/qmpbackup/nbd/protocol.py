# SPDX-License-Identifier: Apache-2.0
"""NBD as bytes: what a server of read-only exports reads and says. Pure.

Numbers, layouts and rules are those of doc/proto.md of NetworkBlockDevice/nbd: the fixed newstyle
handshake, structured replies, block status.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

GREETING: Final = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 0b11)
"""Fixed newstyle, and no zeros after the old way of naming an export."""

CLIENT_FLAGS: Final = (0b11).to_bytes(4)
"""What a client says to that which can do both."""

NO_ZEROES: Final = 0b10
"""The flag by which a client takes that up."""

ALLOCATION: Final = "base:allocation"

CONTEXT: Final = 0
"""The number by which answers call it: that of QEMU's servers, whose answers may be handed on."""

MOST_OPTION: Final = 64 * 1024
"""Bytes of an option that are taken; names have 4096 at most."""

MOST_READ: Final = 32 * 1024 * 1024
"""Bytes of a request, as every server must take."""

REQUEST: Final = struct.Struct(">IHHQQI")
OPTION: Final = struct.Struct(">8sII")

_OPTION_MAGIC = b"IHAVEOPT"
_REQUEST_MAGIC = 0x25609513
_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
ANSWER_BYTES: Final = _OPTION_REPLY.size
_SIMPLE = struct.Struct(">IIQ")
_SIMPLE_MAGIC = 0x67446698
_CHUNK = struct.Struct(">IHHQI")
_CHUNK_MAGIC = 0x668E33EF
_DONE = 1


class Option(IntEnum):
    """What a client may ask for in the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Answer(IntEnum):
    """What a server says to that."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = (1 << 31) + 1
    INVALID = (1 << 31) + 3
    UNKNOWN = (1 << 31) + 6
    TOO_BIG = (1 << 31) + 9


class RequestKind(IntEnum):
    """What a client may ask of an export. Others change it, or are hints, and are refused."""

    READ = 0
    DISCONNECT = 2
    FLUSH = 3
    CACHE = 5
    BLOCK_STATUS = 7


class Failure(IntEnum):
    """Why a request was not carried out (errno)."""

    NOT_PERMITTED = 1
    IO = 5
    INVALID = 22
    TOO_LARGE = 75


UNFRAGMENTED: Final = 1 << 2
"""Flag of a read: answer in one piece."""
ONE_EXTENT: Final = 1 << 3
"""Flag of a block status: one extent is enough."""

READ_ONLY_EXPORT: Final = 0b1 | 0b10 | 1 << 7 | 1 << 8
"""Flags of an export: there are flags, it is read-only, UNFRAGMENTED is known, and several connections
see the same."""

_HOLE_THAT_IS_ZERO = 0b11


EXPORT_BYTES: Final = 8 + 2
"""Size and flags, which end the handshake of a client that has asked in the old way."""


class ProtocolError(Exception):
    """What a client sent is not NBD."""


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """What a client asks of the export."""

    kind: int
    flags: int
    cookie: int
    offset: int
    length: int


def asking_for(export: str) -> bytes:
    """What a client says to the greeting that wants an export and no more."""
    return CLIENT_FLAGS + option(Option.EXPORT_NAME, export.encode())


def option(number: Option, data: bytes = b"") -> bytes:
    """An option as a client asks for it."""
    return OPTION.pack(_OPTION_MAGIC, number, len(data)) + data


def allocation_of(export: str) -> bytes:
    """What a client that wants to know zeros of an export sends with SET_META_CONTEXT."""
    return named(export) + struct.pack(">I", 1) + named(ALLOCATION)


def parse_answer(data: bytes) -> tuple[int, int]:
    """An answer to an option, and how many bytes follow it.

    Raises:
        ProtocolError: it is none.
    """
    magic, _, answer, length = _OPTION_REPLY.unpack(data)
    if magic != _OPTION_REPLY_MAGIC:
        raise ProtocolError("no answer")
    return answer, length


def parse_request(data: bytes | memoryview) -> ClientRequest:
    """A request from its 28 bytes.

    Raises:
        ProtocolError: it is none.
    """
    magic, flags, kind, cookie, offset, length = REQUEST.unpack(data)
    if magic != _REQUEST_MAGIC:
        raise ProtocolError("no request")
    return ClientRequest(kind, flags, cookie, offset, length)


def parse_option(data: bytes) -> tuple[int, int]:
    """Number and length of an option from its 16 bytes.

    Raises:
        ProtocolError: it is none.
    """
    magic, option, length = OPTION.unpack(data)
    if magic != _OPTION_MAGIC:
        raise ProtocolError("no option")
    return option, length


def parse_name(data: bytes) -> tuple[str, bytes]:
    """A name with its length in front, and what follows it.

    Raises:
        ProtocolError: there is none.
    """
    if len(data) < 4:
        raise ProtocolError("no name")
    (length,) = struct.unpack_from(">I", data)
    name, rest = data[4 : 4 + length], data[4 + length :]
    if len(name) != length:
        raise ProtocolError("a name that is cut off")
    try:
        return name.decode(), rest
    except UnicodeDecodeError:
        raise ProtocolError("a name that is no UTF-8") from None


def parse_contexts(data: bytes) -> tuple[str, list[str]]:
    """The export and the contexts that a client asks for.

    Raises:
        ProtocolError: that is not what was sent.
    """
    export, rest = parse_name(data)
    if len(rest) < 4:
        raise ProtocolError("no contexts")
    (count,) = struct.unpack_from(">I", rest)
    rest = rest[4:]
    queries = []
    for _ in range(min(count, len(rest) // 4)):
        query, rest = parse_name(rest)
        queries.append(query)
    if rest or len(queries) != count:
        raise ProtocolError("contexts that are cut off")
    return export, queries


def option_reply(option: int, answer: Answer, data: bytes = b"") -> bytes:
    """An answer within the handshake."""
    return _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, answer, len(data)) + data


def named(name: str) -> bytes:
    """A name as LIST answers with it."""
    encoded = name.encode()
    return struct.pack(">I", len(encoded)) + encoded


def export_info(size: int) -> bytes:
    """Size and flags of an export, as INFO and GO tell it."""
    return struct.pack(">HQH", 0, size, READ_ONLY_EXPORT)


def block_sizes() -> bytes:
    """The sizes of requests, as INFO and GO tell them: least, preferred, most."""
    return struct.pack(">HIII", 3, 1, 64 * 1024, MOST_READ)


def old_export_info(size: int, client_flags: int) -> bytes:
    """The answer to EXPORT_NAME, which has no form of its own."""
    zeros = b"" if client_flags & NO_ZEROES else bytes(124)
    return struct.pack(">QH", size, READ_ONLY_EXPORT) + zeros


def context_reply(option: int, number: int) -> bytes:
    """That the context is known, and its number."""
    return option_reply(
        option, Answer.META_CONTEXT, struct.pack(">I", number) + ALLOCATION.encode()
    )


def simple_reply(cookie: int, failure: int = 0) -> bytes:
    """The old form of an answer; the bytes that were read follow it."""
    return _SIMPLE.pack(_SIMPLE_MAGIC, failure, cookie)


def data_head(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """What stands before a piece of what was read."""
    head = _CHUNK.pack(_CHUNK_MAGIC, _DONE if done else 0, 1, cookie, 8 + length)
    return head + struct.pack(">Q", offset)


def hole(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """A piece that is zeros."""
    head = _CHUNK.pack(_CHUNK_MAGIC, _DONE if done else 0, 2, cookie, 12)
    return head + struct.pack(">QI", offset, length)


def status(cookie: int, context: int, extents: Iterable[tuple[int, bool]]) -> bytes:
    """Lengths of extents, and whether they are zeros."""
    pairs = b"".join(
        struct.pack(">II", length, _HOLE_THAT_IS_ZERO if zero else 0) for length, zero in extents
    )
    head = _CHUNK.pack(_CHUNK_MAGIC, _DONE, 5, cookie, 4 + len(pairs))
    return head + struct.pack(">I", context) + pairs


def error(cookie: int, failure: Failure, message: str = "") -> bytes:
    """That a request failed, and why, as a last structured reply."""
    text = message.encode()[:4096]
    head = _CHUNK.pack(_CHUNK_MAGIC, _DONE, (1 << 15) + 1, cookie, 6 + len(text))
    return head + struct.pack(">IH", failure, len(text)) + text


def nothing(cookie: int) -> bytes:
    """That a request which asks for no bytes was carried out."""
    return _CHUNK.pack(_CHUNK_MAGIC, _DONE, 0, cookie, 0)


def wants_allocation(queries: Sequence[str], *, listing: bool) -> bool:
    """Whether one of these queries means `base:allocation`; a list without any means all."""
    known = {ALLOCATION, "base:"} if listing else {ALLOCATION}
    return bool(known & set(queries)) or (listing and not queries)
