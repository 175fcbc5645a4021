# SPDX-License-Identifier: Apache-2.0
"""Reading a view ourselves: the chunks of each disk that changed, or all, over NBD from QEMU.

What reads right where (the reasons are at `FIRST_RIGHT_SNAPSHOT_ACCESS` and at `method`):

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
    pull.prepare([scratch.create(…) for …], samples={0: [5, 17]},
                 stages=[scratch.create(…) for …] if pull.way is Method.STAGED else [])
    instant = view.take(watchdog, running)
    pull.serve(watch)                                    # takes its time where it is STAGED
    with pull.probing():                                 # a view that breaks meanwhile ends the block
        for seat in seats:
            with pull.open(seat, Flow(speed=lambda: …)) as disk:
                disk.changed                             # one byte a chunk: 1 where something changed
                for chunk in disk.chunks():              # `nbd.reader.Chunk`, each wanted one once
                    …                                    # chunk.data is None: `count` chunks of zeroes
                    chunk.release()
    pull.finish()                                        # only now is what was read known to be right
    teardown.run()

Nothing here knows what becomes of the chunks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum

from qmpbackup import interrupt
from qmpbackup.errors import VmError
from qmpbackup.machine import inventory, nbd_server, staging
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.nbd_server import NbdServer
from qmpbackup.machine.probing import Probe, Probing, Pulse, explained
from qmpbackup.machine.push import FIRST_RIGHT_SNAPSHOT_ACCESS
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.staging import Staging
from qmpbackup.machine.view import View
from qmpbackup.model import Vm
from qmpbackup.nbd import client
from qmpbackup.nbd.library import libnbd
from qmpbackup.nbd.reader import Chunk, Flow, Reader
from qmpbackup.plan import commands
from qmpbackup.plan.commands import Command
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.names import LEDGER, SAMPLES, RunNames
from qmpbackup.plan.progress import WatchDisks
from qmpbackup.undo import UndoStack

_SECTOR = 512
_LINES = 256
"""Commands that are sent at once."""


class Method(Enum):
    """Where a view is read, see the module."""

    V1 = "view"
    V2 = "scratch"
    STAGED = "staged"


def method(vm: Vm) -> Method:
    """The way that is right for a VM. `Pull.start` may yet have to change it to `STAGED`.

    With iothreads QEMU 7.2 dies of an NBD client that leaves (an assertion in
    `nbd_blockdev_client_closed`); since 9.0 clients are served in the main loop.
    """
    if vm.has_iothreads:
        return Method.V1 if vm.version >= (9, 0, 0) else Method.STAGED
    right = vm.version[:2] >= FIRST_RIGHT_SNAPSHOT_ACCESS
    return Method.V1 if right else Method.V2


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
        reader: Reader,
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
        with explained(self.seat):
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
        way: Method,
        *,
        teardown: UndoStack,
    ) -> None:
        self.way = way
        self._monitor = monitor
        self._view = view
        self._seats = seats
        self._names = names
        self._undo = teardown
        self.server: NbdServer | None = None
        """QEMU's, where it is ours."""
        self._known: dict[int, tuple[bytes | bytearray, bytes | bytearray]] = {}
        self._staging: Staging | None = None

    def start(self) -> None:
        """Start QEMU's NBD server; where somebody else has it, the way is `STAGED` from here on.

        Raises:
            QmpBackupError: libnbd is not installed.
            VmError: QEMU refused.
        """
        libnbd()
        try:
            self.server = NbdServer(self._monitor, self._names, self._undo)
        except nbd_server.ServerTaken:
            self.way = Method.STAGED

    def prepare(
        self,
        scratches: Sequence[Scratch],
        samples: Mapping[int, Sequence[int]] | None = None,
        stages: Sequence[Scratch] = (),
    ) -> None:
        """Open scratch images and ledgers, and mark samples (chunks by the number of their disk).

        `scratches`, and `stages` if the way is `STAGED`, are new files, one a disk. Of a disk that is
        read whole samples mean nothing.

        Raises:
            StorageError: an image could not be created.
            VmError: QEMU refused.
        """
        self._view.prepare(scratches, readable=self.way is Method.V2)
        for seat in self._seats:
            chosen = (samples or {}).get(seat.number, ())
            if chosen and seat.shows_marks:
                self._mark(seat, chosen)
        if self.way is Method.STAGED:
            self._staging = Staging(self._monitor, self._view, stages, self._names)
            self._staging.prepare(self._undo)

    def serve(self, watch: WatchDisks | None = None, speed: int = 0) -> None:
        """Make the views readable. `STAGED`, QEMU copies them now, with `speed` as a limit in bytes a
        second for each disk (0: none); from then on nothing is read from QEMU any more.

        Raises:
            StorageError: a local image could not be written.
            JobError: a view broke.
            VmError: QEMU refused.
        """
        if self._staging:
            self._staging.fill(speed, watch, self._undo)
        elif self.server:
            self.server.export(list(self._exports()))

    def _exports(self) -> Iterator[Command]:
        for seat in self._seats:
            bitmaps = [self._view.changed_bitmap(seat), self._view.read_bitmap(seat)]
            if seat.shows_marks:
                ledger = self._names.of(LEDGER, seat.number)
                yield commands.export_add(self._marks(seat), ledger, bitmaps=bitmaps)
            yield commands.export_add(self._snapshot(seat), self._view.snapshot_node(seat))
            if self.way is Method.V2:
                scratch = self._view.scratch_node(seat)
                yield commands.export_add(self._disk(seat), scratch, allocation_depth=True)

    @contextmanager
    def open(self, seat: Seat, flow: Flow | None = None) -> Iterator[PulledDisk]:
        """Open a disk for reading.

        Raises:
            JobError: the view broke.
            ConnectionLost: QEMU went away.
        """
        with ExitStack() as stack:
            stack.enter_context(explained(seat))
            place = self._place(seat, stack)
            changed, wanted = self._maps(seat, place)
            contexts = [client.ALLOCATION, *((client.DEPTH,) if self.way is Method.V2 else ())]
            first = stack.enter_context(client.connect(place.path, place.export, contexts))
            connections = [first]
            if first.shares:
                connections.append(stack.enter_context(client.connect(place.path, place.export)))
            data = first.with_data(wanted, seat.chunk)
            reader = Reader(connections, seat.chunk, wanted, data, flow or Flow())
            yield PulledDisk(seat, changed, wanted, reader)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Ask all views every second whether they still stand, wherever the block looks at signals:
        one that broke gives nothing from then on, but who reads slowly, waits for a target, or reads
        the scratch, would not notice for hours. Where QEMU has copied all there is nothing to ask.

        Raises:
            JobError: a view broke.
            ConnectionLost: QEMU went away.
        """
        if self._staging:
            yield
            return
        views, pulse = Probing(self._probes()), Pulse(self._monitor)
        with interrupt.asking(views.ask), interrupt.asking(pulse.ask):
            yield

    def _probes(self) -> list[Probe]:
        """How to ask the views of all disks of which something is wanted."""
        probes = []
        for seat in self._seats:
            with explained(seat), ExitStack() as stack:
                _, wanted = self._maps(seat, self._place(seat, stack))
                first = wanted.find(1)
                if first >= 0:
                    probes.append(Probe(seat, self._path, self._snapshot(seat), first * seat.chunk))
        return probes

    def finish(self) -> None:
        """Make sure that what was read is right: no view may have broken until now.

        Raises:
            JobError: a view broke.
            ConnectionLost: QEMU went away.
        """
        if self.way is not Method.V2:
            return
        # A broken view gives nothing from here on; the scratch goes on as if it knew.
        for probe in self._probes():
            probe.ask()

    def _place(self, seat: Seat, stack: ExitStack) -> "_Place":
        """Where a disk is read, and where it is told what has changed of it and what to read."""
        changed, read = self._view.changed_bitmap(seat), self._view.read_bitmap(seat)
        if self._staging:
            path = stack.enter_context(self._staging.served(seat))
            return _Place(path, staging.EXPORT, staging.EXPORT, changed, read)
        return _Place(self._path, self._disk(seat), self._marks(seat), changed, read)

    def _mark(self, seat: Seat, samples: Sequence[int]) -> None:
        """Mark chunks in the ledger by writing to each; without a server by the human monitor."""
        ledger, offsets = self._names.of(LEDGER, seat.number), [at * seat.chunk for at in samples]
        if self.server:
            self._write(self.server, seat, ledger, offsets)
        else:
            lines = [f'qemu-io {ledger} "write -q -z {at} {_SECTOR}"' for at in offsets]
            for start in range(0, len(lines), _LINES):
                self._monitor.execute_all(
                    [
                        Command("human-monitor-command", {"command-line": line})
                        for line in lines[start : start + _LINES]
                    ]
                )
        self._require_marked(seat, ledger, samples)

    def _write(self, server: NbdServer, seat: Seat, ledger: str, offsets: Sequence[int]) -> None:
        marking = UndoStack()
        name = self._names.of("marking", seat.number)
        try:
            server.export([commands.export_add(name, ledger, writable=True)], marking)
            with explained(seat), client.connect(server.path, name) as connection:
                connection.zero(offsets, _SECTOR)
                marking.run()
        finally:
            marking.run()

    def _require_marked(self, seat: Seat, ledger: str, samples: Sequence[int]) -> None:
        """The human monitor tells of no failure, and nothing may depend on our having no bug."""
        wanted = len(set(samples))
        marked = inventory.bitmap_counts(self._monitor, ledger)[
            self._names.of(SAMPLES, seat.number)
        ]
        found = -(-marked // seat.chunk)  # bytes, of a short last chunk as if it were whole
        if found != wanted:
            raise VmError(
                f"The samples of disk {seat.disk.id} could not be marked: {found} are, and not "
                f"{wanted}.",
                "Run again; nothing was lost.",
            )

    def _maps(self, seat: Seat, place: "_Place") -> tuple[bytes | bytearray, bytes | bytearray]:
        """What has changed, and what to read: since the instant that is always the same."""
        if seat.number not in self._known:
            self._known[seat.number] = _maps(seat, place)
        return self._known[seat.number]

    @property
    def _path(self) -> str:
        return self.server.path if self.server else ""

    def _marks(self, seat: Seat) -> str:
        return self._names.of("marks", seat.number)

    def _snapshot(self, seat: Seat) -> str:
        return self._names.of("view", seat.number)

    def _disk(self, seat: Seat) -> str:
        return (
            self._names.of("disk", seat.number) if self.way is Method.V2 else self._snapshot(seat)
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """A socket, with an export that shows a disk and one that shows two bitmaps of it."""

    path: str
    export: str
    marks: str
    changed: str
    read: str


def _maps(seat: Seat, place: _Place) -> tuple[bytes | bytearray, bytes | bytearray]:
    """What has changed, and what to read."""
    if not seat.shows_marks:
        whole = b"\1" * -(-seat.disk.size // seat.chunk)
        return whole, whole
    changed, read = client.bitmap_context(place.changed), client.bitmap_context(place.read)
    with client.connect(place.path, place.marks, [changed, read]) as ledger:
        changes, wanted = ledger.all_marked([changed, read], seat.chunk)
    return changes, wanted
