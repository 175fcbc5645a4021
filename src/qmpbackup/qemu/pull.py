# SPDX-License-Identifier: Apache-2.0
"""Reading a view ourselves: the chunks of each disk that changed, or all, over NBD from QEMU.

What reads right where (QEMU_FACTS, "A view of one instant"):

    V1      the snapshot-access node       QEMU 8.0 and later, with iothreads 9.0 and later
    V2      a scratch above the disk       QEMU 7.1 and later, without iothreads
    STAGED  a local image that QEMU has    iothreads on QEMU before 9.0, or QEMU's NBD server is
            copied the view into           somebody else's

What to read is the same for all: a map of chunks, from the bitmaps of the disk's ledger (see `view`).
*Samples* are chunks to be read although they have not changed. They are marked before the instant, so
that the view protects them like the others, and are as right as these.

    seats = [Seat(disk, number, new_bitmap, base_bitmap, new_end_mark, chunk=CHUNK) for …]
    view = View(monitor, seats, names, teardown=teardown, rollback=rollback)
    pull = Pull(monitor, view, seats, names, method(vm), teardown=teardown)
    pull.start()                                         # now pull.way is certain
    pull.prepare([scratch.create(…) for …], samples={0: [5, 17]})
    instant = view.take(watchdog, running)
    pull.serve()
    for seat in seats:
        with pull.open(seat, Flow(speed=…)) as disk:
            disk.changed                                 # one byte a chunk: 1 where something changed
            for chunk in disk.chunks():                  # `nbd.Chunk`, each wanted one once
                …                                        # chunk.data is None: `count` chunks of zeroes
                chunk.release()
    pull.finish()                                        # only now is what was read known to be right
    teardown.run()

Nothing here knows what becomes of the chunks.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from qmpbackup.errors import ConnectionLost, JobError, QmpBackupError
from qmpbackup.model import Vm
from qmpbackup.plan import commands
from qmpbackup.plan.names import LEDGER, RunNames
from qmpbackup.qemu import nbd, serving
from qmpbackup.qemu.copy import view_broke
from qmpbackup.qemu.monitor import Monitor
from qmpbackup.qemu.nbd import Chunk, Flow, NbdError
from qmpbackup.qemu.serving import Server
from qmpbackup.qemu.view import Seat, View
from qmpbackup.undo import UndoStack

_SECTOR = 512

_BROKEN = frozenset({errno.EINVAL, errno.EPERM, errno.EACCES, errno.EIO})
"""What NBD says of a view whose scratch has failed: it has no EACCES (nbd/server.c)."""


class Way(Enum):
    """Where a view is read, see the module."""

    V1 = "view"
    V2 = "scratch"
    STAGED = "staged"


def method(vm: Vm) -> Way:
    """The way that is right for a VM. `Pull.start` may yet have to change it to `STAGED`.

    QEMU 8.x with iothreads is staged: some of its releases die of a client that leaves.
    """
    if vm.has_iothreads:
        return Way.V1 if vm.version >= (9, 0, 0) else Way.STAGED
    return Way.V1 if vm.version >= (8, 0, 0) else Way.V2


class PulledDisk:
    """One disk of a view, open for reading.

    `changed` and `wanted` have one byte for each chunk, 1 where the chunk has changed, or is to be
    read: the changed ones and the samples. Of a disk that is read whole, both are all ones.
    """

    def __init__(
        self,
        seat: Seat,
        changed: bytes | bytearray,
        wanted: bytes | bytearray,
        reader: nbd.Reader,
    ) -> None:
        self.seat = seat
        self.changed = changed
        self.wanted = wanted
        self._reader = reader

    @property
    def bytes_to_read(self) -> int:
        """How much of the wanted chunks is not known to be zeroes."""
        return self._reader.bytes_to_read

    def chunks(self) -> Iterator[Chunk]:
        """Every wanted chunk once, roughly in order. Iterate once, in one thread.

        Raises:
            JobError: the view broke.
            ConnectionLost: QEMU went away.
            Interrupted: a signal is waiting.
        """
        with _explained(self.seat):
            yield from self._reader.chunks()

    def cancel(self) -> None:
        """Have `chunks` end soon; from any thread."""
        self._reader.cancel()


class Pull:
    """The readable views of one run; see the module for the order of calls."""

    def __init__(
        self,
        monitor: Monitor,
        view: View,
        seats: Sequence[Seat],
        names: RunNames,
        way: Way,
        *,
        teardown: UndoStack,
    ) -> None:
        self.way = way
        self._monitor = monitor
        self._view = view
        self._seats = seats
        self._names = names
        self._undo = teardown
        self._server: Server | None = None

    def start(self) -> None:
        """Start QEMU's NBD server; where somebody else has it, the way is `STAGED` from here on.

        Raises:
            VmError: QEMU refused.
        """
        try:
            self._server = Server(self._monitor, self._names, self._undo)
        except serving.ServerTaken:
            self.way = Way.STAGED

    def prepare(
        self,
        scratches: Sequence[tuple[int, Path]],
        samples: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Open scratch images and ledgers, and mark samples (chunks by the number of their disk).

        Raises:
            StorageError: a scratch image could not be created.
            VmError: QEMU refused.
        """
        self._view.prepare(scratches, readable=self.way is Way.V2)
        for seat in self._seats:
            chosen = (samples or {}).get(seat.number, ())
            if chosen and seat.shows_marks and self._server:
                self._mark(self._server, seat, chosen)

    def serve(self) -> None:
        """Show the views over NBD.

        Raises:
            VmError: QEMU refused.
        """
        if self._server is None:
            return
        exports = []
        for seat in self._seats:
            bitmaps = [self._view.changed_bitmap(seat), self._view.read_bitmap(seat)]
            if seat.shows_marks:
                ledger = self._names.of(LEDGER, seat.number)
                exports.append(commands.export_add(self._marks(seat), ledger, bitmaps=bitmaps))
            snapshot, scratch = self._view.snapshot_node(seat), self._view.scratch_node(seat)
            exports.append(commands.export_add(self._snapshot(seat), snapshot))
            if self.way is Way.V2:
                add = commands.export_add(self._disk(seat), scratch, allocation_depth=True)
                exports.append(add)
        self._server.export(exports)

    @contextmanager
    def open(self, seat: Seat, flow: Flow | None = None) -> Iterator[PulledDisk]:
        """Open a disk for reading.

        Raises:
            JobError: the view broke.
            ConnectionLost: QEMU went away.
        """
        flow = flow or Flow()
        connections: list[nbd.Connection] = []
        try:
            with _explained(seat):
                changed, wanted = self._maps(seat)
                export, contexts = self._disk(seat), [nbd.ALLOCATION]
                if self.way is Way.V2:
                    contexts.append(nbd.DEPTH)
                path = self._path
                connections.append(nbd.connect(path, export, contexts))
                if connections[0].shares:
                    connections.append(nbd.connect(path, export))
                data = connections[0].with_data(wanted, seat.chunk)
            reader = nbd.Reader(connections, seat.chunk, wanted, data, flow)
            yield PulledDisk(seat, changed, wanted, reader)
        finally:
            for connection in connections:
                connection.close()

    def finish(self) -> None:
        """Make sure that what was read is right: no view may have broken until now.

        Raises:
            JobError: a view broke.
            ConnectionLost: QEMU went away.
        """
        if self.way is not Way.V2:
            return
        for seat in self._seats:
            with _explained(seat):
                _, wanted = self._maps(seat)
                first = wanted.find(1)
                if first >= 0:
                    # A broken view gives nothing from here on; the scratch goes on as if it knew.
                    with nbd.connect(self._path, self._snapshot(seat)) as connection:
                        connection.read(first * seat.chunk, _SECTOR)

    def _maps(self, seat: Seat) -> tuple[bytes | bytearray, bytes | bytearray]:
        """What has changed and what to read."""
        if not seat.shows_marks:
            whole = b"\1" * -(-seat.disk.size // seat.chunk)
            return whole, whole
        bitmaps = (self._view.changed_bitmap(seat), self._view.read_bitmap(seat))
        changed, read = map(nbd.bitmap_context, bitmaps)
        with nbd.connect(self._path, self._marks(seat), [changed, read]) as ledger:
            return ledger.marked(changed, seat.chunk), ledger.marked(read, seat.chunk)

    def _mark(self, server: Server, seat: Seat, samples: Sequence[int]) -> None:
        """Mark chunks in the ledger by writing to it."""
        marking = UndoStack()
        name = self._names.of("marking", seat.number)
        try:
            ledger = self._names.of(LEDGER, seat.number)
            server.export([commands.export_add(name, ledger, writable=True)], marking)
            with _explained(seat), nbd.connect(self._path, name) as connection:
                for chunk in samples:
                    connection.zero(chunk * seat.chunk, _SECTOR)
        finally:
            marking.run()

    @property
    def _path(self) -> str:
        return self._server.path if self._server else ""

    def _marks(self, seat: Seat) -> str:
        return self._names.of("marks", seat.number)

    def _snapshot(self, seat: Seat) -> str:
        return self._names.of("view", seat.number)

    def _disk(self, seat: Seat) -> str:
        return self._names.of("disk", seat.number) if self.way is Way.V2 else self._snapshot(seat)


@contextmanager
def _explained(seat: Seat) -> Iterator[None]:
    """Errors of NBD as those that users meet."""
    try:
        yield
    except NbdError as error:
        raise _explanation(seat, error) from error


def _explanation(seat: Seat, error: NbdError) -> QmpBackupError:
    if not error.number:
        return ConnectionLost(
            f"Disk {seat.disk.id} cannot be read over NBD any more: {error}.",
            "If the VM still runs, run again: the next run cleans up and carries on.",
        )
    if error.number in _BROKEN:
        return view_broke(seat.disk.id, str(error))
    return JobError(f"Disk {seat.disk.id} could not be read: {error}.", "Run again.")
