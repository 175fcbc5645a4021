# SPDX-License-Identifier: Apache-2.0
"""Reading NBD exports: which parts of a disk are marked, which hold data, and their bytes.

The one module that knows libnbd (Debian's python3-libnbd), which is imported when a connection is
made and not before. Knows the protocol (NetworkBlockDevice/nbd, doc/proto.md); must not know what
the exports show.

A disk is looked at in *chunks* of one fixed size; the last one may be short. What holds for chunks is
kept as a map of one byte a chunk (0 or 1): a megabyte for a disk of 1 TiB in chunks of 1 MiB.

    with nbd.connect(path, "export", [nbd.ALLOCATION, nbd.bitmap_context("changes")]) as source:
        wanted = source.marked(nbd.bitmap_context("changes"), size)
        data = source.with_data(wanted, size)
        for chunk in nbd.Reader([source], size, wanted, data, nbd.Flow()).chunks():
            if chunk.data is not None:             # else `count` chunks of zeroes
                consume(chunk.data)
            chunk.release()                        # from any thread

The reader keeps several requests in flight and never more buffers than `Flow.buffers`: a consumer
that does not give buffers back stops it.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from qmpbackup import interrupt
from qmpbackup.errors import QmpBackupError

ALLOCATION: Final = "base:allocation"
DEPTH: Final = "qemu:allocation-depth"

_ZERO = 2
"""Bit of `base:allocation`: it reads as zeroes (LIBNBD_STATE_ZERO)."""

_STATUS_BYTES = 1 << 30
"""Length of one question for block status; the field has 32 bits."""

_PIECE = 256 * 1024
"""Bytes of one request to read. QEMU allocates each request's memory anew: above some 512 KiB the
kernel gives and takes it page by page, which costs QEMU twice the CPU (measured with QEMU 7.2)."""

_WRITES_AHEAD = 64
_CONNECT_SECONDS = 60.0
_POLL_SECONDS = 0.1
_LOST = "the connection was lost"

Statuses = dict[str, list[tuple[int, int]]]
"""For each context the (length, flags) of neighbouring extents."""


def bitmap_context(bitmap: str) -> str:
    """The context under which QEMU's servers show a dirty bitmap."""
    return f"qemu:dirty-bitmap:{bitmap}"


class NbdError(Exception):
    """A request failed. `number` is the server's errno, 0 where the connection itself failed."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


@dataclass(frozen=True, slots=True)
class Flow:
    """How to read: chunks asked for at a time, buffers in all (never fewer), and a limit in bytes a
    second (0: none)."""

    requests: int = 8
    buffers: int = 20
    speed: int = 0


class Chunk:
    """What a reader found: one chunk with its bytes, or a run of `count` chunks of zeroes.

    `data` is `None` for zeroes, else the bytes, which are the reader's again after `release`.
    `offset` and `length` are bytes.
    """

    __slots__ = ("_give_back", "count", "data", "index", "length", "offset")

    def __init__(
        self,
        index: int,
        count: int,
        offset: int,
        length: int,
        data: memoryview | None = None,
        give_back: Callable[[], None] | None = None,
    ) -> None:
        self.index = index
        self.count = count
        self.offset = offset
        self.length = length
        self.data = data
        self._give_back = give_back

    def release(self) -> None:
        """Give the buffer back to the reader, from any thread; harmless when repeated."""
        give_back, self._give_back, self.data = self._give_back, None, None
        if give_back is not None:
            give_back()


class Connection:
    """A connection to one export. Use as a context manager.

    Every wait looks at signals. How long a request takes is the storage's business.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.size: int = handle.get_size()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye unless a request is still under way, and disconnect; never raises or waits."""
        from nbd import Error

        with suppress(Error):
            if not self.handle.aio_in_flight():
                self.handle.aio_disconnect()
        _hang_up(self.handle)
        self.handle = None

    @property
    def shares(self) -> bool:
        """Whether further connections see the same (NBD_FLAG_CAN_MULTI_CONN)."""
        return bool(self.handle.can_multi_conn())

    def read(self, offset: int, length: int) -> bytes:
        """Read a few bytes.

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        from nbd import Buffer

        found = bytearray(length)
        shared = Buffer.from_buffer(found)
        self._carry_out(lambda: self.handle.aio_pread(shared, offset))
        return bytes(found)

    def zero(self, places: Iterable[int], length: int) -> None:
        """Write zeroes of some length at each of these offsets.

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        from nbd import Buffer, Error

        zeroes = Buffer.from_buffer(bytearray(length))
        try:
            waiting: deque[int] = deque()
            for offset in places:
                waiting.append(self.handle.aio_pwrite(zeroes, offset))
                if len(waiting) == _WRITES_AHEAD:
                    self._settle(waiting.popleft())
            for cookie in waiting:
                self._settle(cookie)
        except Error as error:
            raise _failure(error, self.handle) from error

    def marked(self, context: str, chunk: int) -> bytearray:
        """The map of chunks of which something is marked in a context (a bitmap).

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        found = bytearray(-(-self.size // chunk))
        for at, statuses in self._ask(0, self.size):
            _note(found, at, statuses[context], chunk, bool)
        return found

    def with_data(self, wanted: bytes | bytearray, chunk: int) -> bytearray:
        """The map of those of the wanted chunks that are not known to be zeroes.

        An area that was asked for with `DEPTH` counts as zeroes only if it does not lie in the
        topmost image, see `pull`.

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        found = bytearray(len(wanted))
        for first, count in runs(wanted, 1):
            start, end = first * chunk, min((first + count) * chunk, self.size)
            for at, statuses in self._ask(start, end):
                _note(found, at, statuses[ALLOCATION], chunk, lambda flags: not flags & _ZERO)
                _note(found, at, statuses.get(DEPTH, ()), chunk, lambda depth: depth == 1)
        return found

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Offset and length of neighbouring areas, and whether they are known to be zeroes.

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        for at, statuses in self._ask(start, end):
            for length, flags in statuses[ALLOCATION]:
                yield at, length, bool(flags & _ZERO)
                at += length  # noqa: PLW2901 - the extents follow one another

    def _ask(self, start: int, end: int) -> Iterator[tuple[int, Statuses]]:
        """Ask for the status of an area, in pieces that every context covers."""
        while start < end:
            statuses: Statuses = {}

            def note(context: str, _at: int, entries: list[int], _error: object) -> int:
                statuses[context] = list(zip(entries[::2], entries[1::2], strict=True))  # noqa: B023
                return 0

            length = min(end - start, _STATUS_BYTES)
            self._carry_out(partial(self.handle.aio_block_status, length, start, note))
            known = [sum(length for length, _ in extents) for extents in statuses.values()]
            if not known or not min(known):
                raise NbdError(0, "the server does not tell the status of the export")
            length = min(*known, end - start)
            yield start, {context: _cut(each, length) for context, each in statuses.items()}
            start += length

    def _carry_out(self, send: Callable[[], int]) -> None:
        from nbd import Error

        try:
            self._settle(send())
        except Error as error:
            raise _failure(error, self.handle) from error

    def _settle(self, cookie: int) -> None:
        while not self.handle.aio_command_completed(cookie):
            _turn(self.handle)


def require() -> None:
    """Make sure that libnbd is there.

    Raises:
        QmpBackupError: it is not installed.
    """
    _library()


def connect(path: str, export: str, contexts: Sequence[str] = ()) -> Connection:
    """Open an export at a unix socket.

    Raises:
        NbdError: there is no such server, export or context.
        QmpBackupError: libnbd is not installed.
    """
    nbd = _library()
    handle = nbd.NBD()
    try:
        return _connected(handle, path, export, contexts)
    except BaseException:
        _hang_up(handle)
        raise


def _connected(handle: Any, path: str, export: str, contexts: Sequence[str]) -> Connection:
    nbd = _library()
    try:
        handle.set_export_name(export)
        for context in contexts:
            handle.add_meta_context(context)
        handle.set_pread_initialize(False)
        handle.aio_connect_unix(path)
        deadline = time.monotonic() + _CONNECT_SECONDS
        while not handle.aio_is_ready():
            _turn(handle)
            if time.monotonic() > deadline:
                raise NbdError(0, "the server does not answer")
        missing = [each for each in contexts if not handle.can_meta_context(each)]
    except nbd.Error as error:
        raise _failure(error, handle) from error
    if missing:
        raise NbdError(0, f"the export has no {missing[0]}")
    return Connection(handle)


def _hang_up(handle: Any) -> None:
    """End a connection now, whoever still refers to it, as the frames of an error do.

    QEMU 7.2 waits with all of the VM for a client that is still negotiating when the server is
    stopped.
    """
    import socket

    from nbd import Error

    with suppress(Error, OSError), socket.socket(fileno=os.dup(handle.aio_get_fd())) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _turn(handle: Any) -> None:
    """Let a connection do what it can; look at signals and at its health."""
    interrupt.check()
    if handle.aio_is_dead() or handle.aio_is_closed():
        raise NbdError(0, _LOST)
    handle.poll(int(_POLL_SECONDS * 1000))


def runs(chunks: bytes | bytearray, value: int) -> Iterator[tuple[int, int]]:
    """The runs of a value in a map, as (first chunk, number of chunks)."""
    start = chunks.find(value)
    while start >= 0:
        end = chunks.find(1 - value, start)
        end = len(chunks) if end < 0 else end
        yield start, end - start
        start = chunks.find(value, end)


class Reader:
    """Reads the wanted chunks of an export over one or more connections to it.

    Iterate in one thread; buffers may be given back and `cancel` be called from any. Chunks come
    roughly in order; zeroes in runs as long as possible, and never over the wire.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        chunk: int,
        wanted: bytes | bytearray,
        data: bytes | bytearray,
        flow: Flow,
    ) -> None:
        """`wanted` is what to deliver, `data` what of it has to be read (`Connection.with_data`)."""
        self._connections = [_Line(connection) for connection in connections]
        self._size = connections[0].size
        self._chunk = chunk
        self._wanted = wanted
        self._data = data
        self._flow = flow
        self._pool = _Pool(chunk, max(flow.requests, flow.buffers))
        self._throttle = _Throttle(flow.speed)
        self._cancelled = False

    @property
    def bytes_to_read(self) -> int:
        """How much will be read over the wire."""
        last = len(self._data) - 1
        short = len(self._data) * self._chunk - self._size if last >= 0 and self._data[last] else 0
        return self._data.count(1) * self._chunk - short

    def cancel(self) -> None:
        """Make the iteration end soon, without an error."""
        self._cancelled = True
        self._pool.wake()

    def chunks(self) -> Iterator[Chunk]:
        """Deliver every wanted chunk once.

        Raises:
            NbdError: a request failed.
            Interrupted: a signal is waiting.
        """
        try:
            yield from self._deliver()
        finally:
            # What is still under way goes with its connection, and nothing else turns its wheels.
            self._pool.close()

    def _deliver(self) -> Iterator[Chunk]:
        plan = self._plan()
        ahead: Chunk | None = next(plan, None)
        while not self._cancelled:
            interrupt.check()
            while ahead is not None:
                if ahead.data is None and ahead.count and not self._data[ahead.index]:
                    yield ahead
                elif not self._request(ahead):
                    break
                ahead = next(plan, None)
            yield from self._arrived()
            if ahead is None and not any(line.waiting for line in self._connections):
                return
            self._wait(ahead)

    def _plan(self) -> Iterator[Chunk]:
        """What there is to deliver, in order: single chunks to be read and runs of zeroes."""
        for first, count in runs(self._wanted, 1):
            at, end = first, first + count
            while at < end:
                if self._data[at]:
                    yield self._piece(at, 1)
                    at += 1
                else:
                    stop = self._data.find(1, at, end)
                    stop = end if stop < 0 else stop
                    yield self._piece(at, stop - at)
                    at = stop

    def _piece(self, index: int, count: int) -> Chunk:
        offset = index * self._chunk
        return Chunk(index, count, offset, min(count * self._chunk, self._size - offset))

    def _request(self, chunk: Chunk) -> bool:
        """Ask for a chunk; false where that has to wait."""
        line = min(self._connections, key=lambda each: each.waiting)
        in_flight = sum(each.waiting for each in self._connections)
        if in_flight >= self._flow.requests or self._throttle.wait > 0:
            return False
        buffer = self._pool.take()
        if buffer is None:
            return False
        self._throttle.spend(chunk.length)
        line.ask(chunk, buffer)
        return True

    def _arrived(self) -> Iterator[Chunk]:
        for line in self._connections:
            for chunk, buffer in line.arrived():
                view = memoryview(buffer.memory)[: chunk.length]
                yield Chunk(
                    chunk.index, 1, chunk.offset, chunk.length, view, self._pool.returning(buffer)
                )

    def _wait(self, ahead: Chunk | None) -> None:
        """Wait until something arrives, a buffer comes back, the limit allows more, or a server
        goes away."""
        poll = select.poll()
        if ahead is not None:
            poll.register(self._pool.fileno(), select.POLLIN)
        for line in self._connections:
            poll.register(line.fileno(), line.events())
        patience = _POLL_SECONDS
        if ahead is not None and 0 < self._throttle.wait < patience:
            patience = self._throttle.wait
        ready = dict(poll.poll(patience * 1000 + 1))
        self._pool.quiet(self._pool.fileno() in ready)
        for line in self._connections:
            if line.fileno() in ready:
                line.serve(ready[line.fileno()])


class _Buffer:
    """Memory for a chunk, and the pieces of it that libnbd reads into.

    libnbd keeps what it is given for good: version 1.14 takes a reference at each request that it
    never gives back. So the pieces are few, serve for one request after another, and let go of the
    memory in the end.
    """

    __slots__ = ("_pieces", "_views", "memory")

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)
        self._views: list[memoryview] = []
        self._pieces = [self._piece(at, min(at + _PIECE, size)) for at in range(0, size, _PIECE)]

    def pieces(self, length: int) -> Iterator[tuple[int, Any]]:
        """What to read the first `length` bytes into, each with where it begins."""
        for number, piece in enumerate(self._pieces):
            at = number * _PIECE
            if at < length:
                whole = min(at + _PIECE, len(self.memory)) <= length
                yield at, piece if whole else self._piece(at, length)

    def close(self) -> None:
        """Let go of the memory, which lasts for as long as somebody reads or writes it."""
        for view in self._views:
            view.release()

    def _piece(self, start: int, end: int) -> Any:
        from nbd import Buffer

        view = memoryview(self.memory)[start:end]
        self._views.append(view)
        return Buffer.from_buffer(view)


@dataclass(slots=True)
class _Request:
    """A chunk that was asked for, its buffer, and how many of its pieces are still to come."""

    chunk: Chunk
    buffer: _Buffer
    pieces: int = 0


class _Line:
    """One connection with the pieces of chunks that are in flight on it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pieces: dict[int, _Request] = {}
        self.waiting = 0
        """Chunks asked for that are not complete."""

    def fileno(self) -> int:
        return int(self._connection.handle.aio_get_fd())

    def events(self) -> int:
        direction = self._connection.handle.aio_get_direction()
        readable = select.POLLIN if direction & _READ else 0
        return readable | (select.POLLOUT if direction & _WRITE else 0)

    def ask(self, chunk: Chunk, buffer: _Buffer) -> None:
        from nbd import Error

        self._require_alive()
        request = _Request(chunk, buffer)
        self.waiting += 1
        try:
            for at, piece in buffer.pieces(chunk.length):
                cookie = self._connection.handle.aio_pread(piece, chunk.offset + at)
                self._pieces[cookie] = request
                request.pieces += 1
        except Error as error:
            raise _failure(error, self._connection.handle) from error

    def serve(self, ready: int) -> None:
        from nbd import Error

        direction = self._connection.handle.aio_get_direction()
        try:
            if direction & _READ and ready & ~select.POLLOUT:
                self._connection.handle.aio_notify_read()
            elif direction & _WRITE and ready & select.POLLOUT:
                self._connection.handle.aio_notify_write()
        except Error as error:
            raise _failure(error, self._connection.handle) from error

    def arrived(self) -> Iterator[tuple[Chunk, _Buffer]]:
        from nbd import Error

        while self._pieces:
            try:
                cookie = self._connection.handle.aio_peek_command_completed()
                if not cookie:
                    break
                request = self._pieces.pop(cookie)
                self._connection.handle.aio_command_completed(cookie)
            except Error as error:
                raise _failure(error, self._connection.handle) from error
            request.pieces -= 1
            if not request.pieces:
                self.waiting -= 1
                yield request.chunk, request.buffer
        self._require_alive()

    def _require_alive(self) -> None:
        if self._connection.handle.aio_is_dead() or self._connection.handle.aio_is_closed():
            raise NbdError(0, _LOST)


_READ, _WRITE = 1, 2
"""Bits of `aio_get_direction` (libnbd.h)."""


class _Pool:
    """Buffers that go round. They are made when first needed."""

    def __init__(self, size: int, most: int) -> None:
        self._size = size
        self._left = most
        self._made: list[_Buffer] = []
        self._free: deque[_Buffer] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        return self._event

    def take(self) -> _Buffer | None:
        if self._free:
            return self._free.popleft()
        if not self._left:
            return None
        self._left -= 1
        buffer = _Buffer(self._size)
        self._made.append(buffer)
        return buffer

    def returning(self, buffer: _Buffer) -> Callable[[], None]:
        def give_back() -> None:
            self._free.append(buffer)
            self.wake()

        return give_back

    def wake(self) -> None:
        """Let whoever waits at the descriptor go on."""
        with self._open:
            if not self._closed:
                os.eventfd_write(self._event, 1)

    def quiet(self, ready: bool) -> None:
        if ready:
            with suppress(BlockingIOError):
                os.eventfd_read(self._event)

    def close(self) -> None:
        with self._open:
            self._closed = True
            os.close(self._event)
        for buffer in self._made:
            buffer.close()


class _Throttle:
    """A limit in bytes a second, without credit for times in which nothing was read."""

    def __init__(self, speed: int) -> None:
        self._speed = speed
        self._next = 0.0

    @property
    def wait(self) -> float:
        """Seconds until the next request may go."""
        return max(0.0, self._next - time.monotonic()) if self._speed else 0.0

    def spend(self, length: int) -> None:
        if self._speed:
            self._next = max(self._next, time.monotonic()) + length / self._speed


def _note(
    found: bytearray,
    at: int,
    extents: Sequence[tuple[int, int]],
    chunk: int,
    counts: Callable[[int], bool],
) -> None:
    """Set the chunks that an extent which counts has a part in; extents begin at byte `at`."""
    for length, flags in extents:
        if counts(flags):
            first, end = at // chunk, -(-(at + length) // chunk)
            found[first:end] = b"\1" * (end - first)
        at += length


def _cut(extents: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The extents of the first `length` bytes."""
    kept = []
    for size, flags in extents:
        if length <= 0:
            break
        kept.append((min(size, length), flags))
        length -= size
    return kept


def _library() -> Any:
    try:
        import nbd
    except ImportError:
        raise QmpBackupError(
            "libnbd's module for Python is not installed.",
            "On Debian and Ubuntu: apt install python3-libnbd.",
        ) from None
    return nbd


def _failure(error: Any, handle: Any) -> NbdError:
    closed = handle.aio_is_dead() or handle.aio_is_closed()
    return NbdError(0 if closed else error.errnum or 0, error.string)
