# SPDX-License-Identifier: Apache-2.0
"""One client of a server: the handshake, then requests, answered here or by a pool of threads.

What can be had without waiting is answered in the client's own thread, the rest in the pool, in pieces, so
that memory is bounded by the number of threads. Knows the protocol; must not know what exports show.
"""

import logging
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, Protocol

from qmpbackup.errors import DamagedError, Interrupted, QmpBackupError
from qmpbackup.nbd import protocol, relay
from qmpbackup.nbd.protocol import (
    Answer,
    ClientRequest,
    Failure,
    Option,
    ProtocolError,
    RequestKind,
)

log = logging.getLogger(__name__)

_PIECE: Final = 1024 * 1024
"""Bytes that are read and answered at a time, at most; aligned."""
_UNDER_WAY: Final = 64
"""Requests of one client that are not answered yet."""
_HANDSHAKE_SECONDS: Final = 30.0
_SEND_BUFFER: Final = 4 << 20
_MOST_EXTENTS: Final = 1024

IS_DAMAGED: Final = "is damaged"
NOT_READ: Final = "could not be read"
"""What the log says of an export, some of which could not be given to a client."""

Buffer = bytes | bytearray | memoryview


class Export(Protocol):
    """What is served under a name, read from many threads."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Neighbouring areas: offset, length, and whether they are zeros."""

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """Bytes; a `QmpBackupError` becomes an I/O error of the client's."""

    def peek(self, offset: int, length: int) -> bytes | memoryview | None:
        """The same, if nothing has to be waited for."""


class Host(Protocol):
    """What a session asks of the server that it belongs to."""

    exports: Mapping[str, Export]
    allocation: bool
    relayed: Mapping[str, str]
    pool: ThreadPoolExecutor

    def left(self, session: "Conversation") -> None:
        """The client has gone."""

    def interrupted(self, signal: Interrupted) -> None:
        """A thread that reads has been given a signal that is the main thread's."""


class Conversation(threading.Thread):
    """One connection."""

    def __init__(self, server: Host, connection: socket.socket) -> None:
        super().__init__(name="nbd-client", daemon=True)
        self.export_name = ""
        self._server = server
        self._socket = connection
        self._sending = threading.Lock()
        self._room = threading.Semaphore(_UNDER_WAY)
        self._structured = False
        self._allocation = False
        connection.settimeout(_HANDSHAKE_SECONDS)
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def hang_up(self) -> None:
        """End it, from any thread."""
        relay.hang_up(self._socket)

    def run(self) -> None:
        """Shake hands, then answer."""
        try:
            export = self._negotiate()
            if export is not None:
                self._socket.settimeout(None)
                self._serve(export)
        except (OSError, EOFError):
            pass
        except ProtocolError as error:
            log.info("A client was cut off, as it sent %s.", error)
        finally:
            self.hang_up()
            # Answers under way hold the socket; they fail at once now.
            for _ in range(_UNDER_WAY):
                self._room.acquire()
            self._socket.close()
            self._server.left(self)

    # The handshake

    def _negotiate(self) -> Export | None:
        self._socket.sendall(protocol.GREETING)
        flags = int.from_bytes(self._receive(4), "big")
        while True:
            option, length = protocol.parse_option(self._receive(protocol.OPTION.size))
            if length > protocol.MOST_OPTION:
                raise ProtocolError("an option without end")
            data = self._receive(length)
            if option == Option.ABORT:
                self._answer(option, Answer.ACK)
                return None
            if option == Option.EXPORT_NAME:
                return self._old_way(data, flags)
            export = self._option(option, data)
            if export is not None:
                return export

    def _receive(self, length: int) -> bytes:
        return relay.receive(self._socket, length)

    def _answer(self, option: int, answer: Answer, data: bytes = b"") -> None:
        self._socket.sendall(protocol.option_reply(option, answer, data))

    def _old_way(self, data: bytes, flags: int) -> Export | None:
        name = data.decode(errors="replace")
        export = self._server.exports.get(name)
        if export is not None:  # else the protocol knows but to hang up
            self.export_name = name
            self._socket.sendall(protocol.old_export_info(export.size, flags))
        return export

    def _option(self, option: int, data: bytes) -> Export | None:
        """Answer an option; the export, once that is chosen."""
        try:
            if option in {Option.INFO, Option.GO}:
                return self._info(option, data)
            if option == Option.LIST and not data:
                for name in self._server.exports:
                    self._answer(option, Answer.SERVER, protocol.named(name))
                self._answer(option, Answer.ACK)
            elif option == Option.STRUCTURED_REPLY and not data:
                self._structured = True
                self._answer(option, Answer.ACK)
            elif option in {Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT}:
                self._contexts(option, data)
            else:
                self._answer(option, Answer.UNSUPPORTED)
        except ProtocolError:
            self._answer(option, Answer.INVALID)
        return None

    def _info(self, option: int, data: bytes) -> Export | None:
        name, _wanted = protocol.parse_name(data)
        export = self._server.exports.get(name)
        if export is None:
            self._answer(option, Answer.UNKNOWN)
            return None
        self._answer(option, Answer.INFO, protocol.export_info(export.size))
        self._answer(option, Answer.INFO, protocol.block_sizes())
        self._answer(option, Answer.ACK)
        if option == Option.INFO:
            return None
        self.export_name = name
        return export

    def _contexts(self, option: int, data: bytes) -> None:
        name, queries = protocol.parse_contexts(data)
        if name not in self._server.exports:
            self._answer(option, Answer.UNKNOWN)
            return
        setting = option == Option.SET_META_CONTEXT
        found = self._server.allocation and protocol.wants_allocation(queries, listing=not setting)
        if setting:
            self._allocation = found and self._structured
        if found:
            self._socket.sendall(protocol.context_reply(option, protocol.CONTEXT if setting else 0))
        self._answer(option, Answer.ACK)

    # Transmission

    def _serve(self, export: Export) -> None:
        """Answer requests, or have them answered by the server that stands for the export."""
        path = self._server.relayed.get(self.export_name)
        if path is None:
            self._transmit(export)
            return
        try:
            with relay.connected(
                path, structured=self._structured, allocation=self._allocation
            ) as server:
                relay.relay(self._socket, server)
        except (OSError, EOFError, ProtocolError) as error:
            log.info("%s: the connection to its server ended: %s", self.export_name, error)

    def _transmit(self, export: Export) -> None:
        size = protocol.REQUEST.size
        pending = bytearray()
        while True:
            data = self._socket.recv(64 * 1024)
            if not data:
                return
            pending += data
            whole = len(pending) // size * size
            for at in range(0, whole, size):
                request = protocol.parse_request(bytes(pending[at : at + size]))
                if request.kind == RequestKind.DISCONNECT:
                    return
                self._take(export, request)
            del pending[:whole]

    def _take(self, export: Export, request: ClientRequest) -> None:
        """Answer a request, or have it answered."""
        failure = self._refusal(export, request)
        if failure:
            self._fail(request, failure)
        elif request.kind in {RequestKind.FLUSH, RequestKind.CACHE}:
            self._send(self._nothing(request))
        elif not self._answered_at_once(export, request):
            self._room.acquire()
            self._server.pool.submit(self._work, export, request)

    def _refusal(self, export: Export, request: ClientRequest) -> Failure | None:
        if request.kind == RequestKind.FLUSH:
            return None
        if request.kind not in {RequestKind.READ, RequestKind.CACHE, RequestKind.BLOCK_STATUS}:
            # A write brings its bytes along, which cannot be told from requests any more.
            if request.kind == 1:
                raise ProtocolError("a write to a read-only export")
            return Failure.NOT_PERMITTED
        if request.kind == RequestKind.BLOCK_STATUS and not self._allocation:
            return Failure.INVALID
        if not request.length or request.offset + request.length > export.size:
            return Failure.INVALID
        if request.kind == RequestKind.READ and request.length > protocol.MOST_READ:
            return Failure.TOO_LARGE
        return None

    def _answered_at_once(self, export: Export, request: ClientRequest) -> bool:
        if request.kind != RequestKind.READ or request.length > _PIECE:
            return False
        data = export.peek(request.offset, request.length)
        if data is None:
            return False
        self._send(self._head(request, request.offset, len(data), done=True), data)
        return True

    def _work(self, export: Export, request: ClientRequest) -> None:
        """Answer a request, in a thread of the pool."""
        try:
            if request.kind == RequestKind.READ:
                self._read(export, request)
            else:
                self._status(export, request)
        except OSError:
            self.hang_up()
        except QmpBackupError as error:
            self._say(error)
            self._fail_late(request)
        except Interrupted as signal:
            self._server.interrupted(signal)
            self.hang_up()
        except Exception:
            log.exception("A request of a client could not be answered.")
            self.hang_up()
        finally:
            self._room.release()

    def _say(self, error: QmpBackupError) -> None:
        level, what = (
            (logging.ERROR, IS_DAMAGED)
            if isinstance(error, DamagedError)
            else (logging.WARNING, NOT_READ)
        )
        log.log(level, "%s %s: %s", self.export_name or "The export", what, error.message)

    def _read(self, export: Export, request: ClientRequest) -> None:
        """Read and answer, piece by piece; in one, where the client wants that."""
        end = request.offset + request.length
        if not self._structured or request.flags & protocol.UNFRAGMENTED:
            data = export.read(request.offset, request.length)
            self._send(self._head(request, request.offset, len(data), done=True), data)
            return
        for offset, length, zero in _pieces(export, request.offset, end):
            done = offset + length == end
            if zero:
                self._send(protocol.hole(request.cookie, offset, length, done=done))
            else:
                data = export.read(offset, length)
                self._send(self._head(request, offset, length, done=done), data)

    def _status(self, export: Export, request: ClientRequest) -> None:
        most = 1 if request.flags & protocol.ONE_EXTENT else _MOST_EXTENTS
        found: list[tuple[int, bool]] = []
        for _, length, zero in export.extents(request.offset, request.offset + request.length):
            found.append((length, zero))
            if len(found) == most:
                break
        self._send(protocol.status(request.cookie, protocol.CONTEXT, found))

    def _head(self, request: ClientRequest, offset: int, length: int, *, done: bool) -> bytes:
        if self._structured:
            return protocol.data_head(request.cookie, offset, length, done=done)
        return protocol.simple_reply(request.cookie)

    def _nothing(self, request: ClientRequest) -> bytes:
        return (protocol.nothing if self._structured else protocol.simple_reply)(request.cookie)

    def _fail(self, request: ClientRequest, failure: Failure) -> None:
        if self._structured:
            self._send(protocol.error(request.cookie, failure))
        else:
            self._send(protocol.simple_reply(request.cookie, failure))

    def _fail_late(self, request: ClientRequest) -> None:
        with suppress(OSError):
            self._fail(request, Failure.IO)

    def _send(self, head: bytes, data: Buffer = b"") -> None:
        """Send an answer whole, before anybody else's."""
        parts: Sequence[Buffer] = (head, data)
        with self._sending:
            sent = self._socket.sendmsg(parts)
            if sent < len(head):
                self._socket.sendall(head[sent:])
                sent = len(head)
            if sent < len(head) + len(data):
                self._socket.sendall(memoryview(data)[sent - len(head) :])


def _pieces(export: Export, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """A range in pieces that are zeros, or are read at a time."""
    for offset, length, zero in export.extents(start, end):
        if zero:
            yield offset, length, True
            continue
        at = offset
        while at < offset + length:
            size = min(offset + length, (at // _PIECE + 1) * _PIECE) - at
            yield at, size, False
            at += size
