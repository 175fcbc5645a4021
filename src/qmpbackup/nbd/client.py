# SPDX-License-Identifier: Apache-2.0
"""Connections to NBD exports: which parts of a disk are marked, and which hold data.

Knows the protocol (NetworkBlockDevice/nbd, doc/proto.md); must not know what the exports show. Bytes
of whole disks are read by `reader`.

A disk is looked at in *chunks* of one fixed size; the last one may be short. What holds for chunks is
kept as a map of one byte a chunk (0 or 1): a megabyte for a disk of 1 TiB in chunks of 1 MiB.

    with client.connect(path, "export", [ALLOCATION, bitmap_context("changes")]) as source:
        wanted = source.marked(bitmap_context("changes"), size)
        data = source.with_data(wanted, size)
        for chunk in Reader([source], size, wanted, data, Flow()).chunks():
            if chunk.data is not None:             # else `count` chunks of zeroes
                consume(chunk.data)
            chunk.release()                        # from any thread
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Any, Final, Self

from qmpbackup import interrupt
from qmpbackup.nbd.library import NbdError, failure, libnbd, require_alive
from qmpbackup.plan.chunk_map import runs

ALLOCATION: Final = "base:allocation"
DEPTH: Final = "qemu:allocation-depth"

_ZERO = 2
"""Bit of `base:allocation`: it reads as zeroes (LIBNBD_STATE_ZERO)."""

_STATUS_BYTES = 1 << 30
"""Length of one question for block status: what a much divided area answers is held in memory."""

_READ_AT_ONCE = 1 << 20
_WRITES_AHEAD = 64
_QUESTIONS_AHEAD = 4
_CONNECT_SECONDS = 60.0
_POLL_SECONDS = 0.1

Statuses = dict[str, list[tuple[int, int]]]
"""For each context the (length, flags) of neighbouring extents."""


def bitmap_context(bitmap: str) -> str:
    """The context under which QEMU's servers show a dirty bitmap."""
    return f"qemu:dirty-bitmap:{bitmap}"


class Connection:
    """A connection to one export. Use as a context manager.

    Every wait looks at signals. How long a request takes is the storage's business.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.size: int = handle.get_size()
        self._memory = bytearray()

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
        found = bytearray()
        while len(found) < length:
            count = min(length - len(found), _READ_AT_ONCE)
            found += self._read(offset + len(found), count)
        return bytes(found)

    def _read(self, offset: int, length: int) -> memoryview:
        """A part, which is true until the next is read: libnbd 1.14 keeps every piece of memory for ever
        that it was given to read into, so it is always the same."""
        from nbd import Buffer

        self._memory = self._memory or bytearray(_READ_AT_ONCE)
        part = memoryview(self._memory)[:length]
        shared = Buffer.from_buffer(part)
        self._carry_out(lambda: self.handle.aio_pread(shared, offset))
        return part

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
            raise failure(error, self.handle) from error

    def marked(self, context: str, chunk: int) -> bytearray:
        """The map of chunks of which something is marked in a context (a bitmap).

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        return self.all_marked([context], chunk)[0]

    def all_marked(self, contexts: Sequence[str], chunk: int) -> list[bytearray]:
        """The maps of several contexts, asked for at once.

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        found = [bytearray(-(-self.size // chunk)) for _ in contexts]
        for at, statuses in self._ask_all([(0, self.size)]):
            for context, marks in zip(contexts, found, strict=True):
                _note(marks, at, statuses[context], chunk, bool)
        return found

    def with_data(self, wanted: bytes | bytearray, chunk: int) -> bytearray:
        """The map of those of the wanted chunks that are not known to be zeroes.

        An area that was asked for with `DEPTH` counts as zeroes only if it does not lie in the
        topmost image, see `pull`.

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        found = bytearray(len(wanted))
        areas = (
            (first * chunk, min((first + count) * chunk, self.size))
            for first, count in runs(wanted, 1)
        )
        for at, statuses in self._ask_all(areas):
            _note(found, at, statuses[ALLOCATION], chunk, lambda flags: not flags & _ZERO)
            _note(found, at, statuses.get(DEPTH, ()), chunk, lambda depth: depth == 1)
        return found

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Offset and length of neighbouring areas, and whether they are known to be zeroes.

        Raises:
            NbdError: the server refused, or the connection failed.
        """
        for at, statuses in self._ask_all([(start, end)], ahead=1):
            for length, flags in statuses[ALLOCATION]:
                yield at, length, bool(flags & _ZERO)
                at += length  # noqa: PLW2901 - the extents follow one another

    def _ask_all(
        self, areas: Iterable[tuple[int, int]], ahead: int = _QUESTIONS_AHEAD
    ) -> Iterator[tuple[int, Statuses]]:
        """Ask for the status of areas (start, end), several questions at a time; gives them in their
        order, in pieces that every context covers."""
        from nbd import Error

        pieces = _pieces(areas)
        waiting: deque[_Question] = deque()
        try:
            while True:
                for start, end in islice(pieces, ahead - len(waiting)):
                    waiting.append(_Question(self.handle, start, end))
                if not waiting:
                    return
                asked = waiting.popleft()
                self._settle(asked.cookie)
                length = asked.length
                yield asked.start, asked.cut()
                if asked.start + length < asked.end:
                    waiting.appendleft(_Question(self.handle, asked.start + length, asked.end))
        except Error as error:
            raise failure(error, self.handle) from error

    def _carry_out(self, send: Callable[[], int]) -> None:
        from nbd import Error

        try:
            self._settle(send())
        except Error as error:
            raise failure(error, self.handle) from error

    def _settle(self, cookie: int) -> None:
        while not self.handle.aio_command_completed(cookie):
            _turn(self.handle)


def _pieces(areas: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The areas, in pieces that one question may be about."""
    for start, end in areas:
        for at in range(start, end, _STATUS_BYTES):
            yield at, min(end, at + _STATUS_BYTES)


class _Question:
    """A question for the status of an area, which has been sent."""

    def __init__(self, handle: Any, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._statuses: Statuses = {}
        self.cookie: int = handle.aio_block_status(end - start, start, self._note)

    def _note(self, context: str, _at: int, entries: list[int], _error: object) -> int:
        self._statuses[context] = list(zip(entries[::2], entries[1::2], strict=True))
        return 0

    @property
    def length(self) -> int:
        """How much of the area every context has told of.

        Raises:
            NbdError: nothing of it.
        """
        known = [sum(length for length, _ in extents) for extents in self._statuses.values()]
        if not known or not min(known):
            raise NbdError(0, "the server does not tell the status of the export")
        return min(*known, self.end - self.start)

    def cut(self) -> Statuses:
        """The answer, for as much as every context has told of."""
        return {context: _cut(each, self.length) for context, each in self._statuses.items()}


def connect(path: str, export: str, contexts: Sequence[str] = ()) -> Connection:
    """Open an export at a unix socket.

    Raises:
        NbdError: there is no such server, export or context.
        QmpBackupError: libnbd is not installed.
    """
    nbd = libnbd()
    handle = nbd.NBD()
    try:
        return _connected(handle, path, export, contexts)
    except BaseException:
        _hang_up(handle)
        raise


def _connected(handle: Any, path: str, export: str, contexts: Sequence[str]) -> Connection:
    nbd = libnbd()
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
        raise failure(error, handle) from error
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
    require_alive(handle)
    handle.poll(int(_POLL_SECONDS * 1000))


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
