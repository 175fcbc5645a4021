# SPDX-License-Identifier: Apache-2.0
"""Reading the chunks of an NBD export, many requests at a time.

Several requests are kept in flight, and never more buffers than `Flow.buffers`: a consumer that does
not give buffers back stops the reader. See `client` for what is wanted, and how it looks in use.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qmpbackup import interrupt
from qmpbackup.nbd.client import Connection
from qmpbackup.nbd.library import failure, require_alive
from qmpbackup.plan.chunk_map import runs
from qmpbackup.plan.speed import Speed, unlimited

_PIECE = 256 * 1024
"""Bytes of one request to read. QEMU allocates each request's memory anew: above some 512 KiB the
kernel gives and takes it page by page, which costs QEMU twice the CPU (measured with QEMU 7.2)."""

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Flow:
    """How to read: chunks asked for at a time, buffers in all (never fewer), and a limit."""

    requests: int = 8
    buffers: int = 20
    speed: Speed = unlimited


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

        require_alive(self._connection.handle)
        request = _Request(chunk, buffer)
        self.waiting += 1
        try:
            for at, piece in buffer.pieces(chunk.length):
                cookie = self._connection.handle.aio_pread(piece, chunk.offset + at)
                self._pieces[cookie] = request
                request.pieces += 1
        except Error as error:
            raise failure(error, self._connection.handle) from error

    def serve(self, ready: int) -> None:
        from nbd import Error

        direction = self._connection.handle.aio_get_direction()
        try:
            if direction & _READ and ready & ~select.POLLOUT:
                self._connection.handle.aio_notify_read()
            elif direction & _WRITE and ready & select.POLLOUT:
                self._connection.handle.aio_notify_write()
        except Error as error:
            raise failure(error, self._connection.handle) from error

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
                raise failure(error, self._connection.handle) from error
            request.pieces -= 1
            if not request.pieces:
                self.waiting -= 1
                yield request.chunk, request.buffer
        require_alive(self._connection.handle)


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
    """A limit that may change at any time, without credit for times in which nothing was read.

    What was read is a debt, which goes by the limit of the day: what was read when that was low holds
    nothing up once it is high.
    """

    def __init__(self, speed: Speed, now: Callable[[], float] = time.monotonic) -> None:
        self._speed = speed
        self._now = now
        self._debt = 0.0
        self._looked = now()

    @property
    def wait(self) -> float:
        """Seconds until the next request may go."""
        speed = self._speed()
        now = self._now()
        paid = (now - self._looked) * speed if speed else self._debt
        self._debt, self._looked = max(0.0, self._debt - paid), now
        return self._debt / speed if speed else 0.0

    def spend(self, length: int) -> None:
        """So much is read, right after it might."""
        self._debt += length
