# SPDX-License-Identifier: Apache-2.0
"""Reading views over NBD as a backup does, step by step, so that tests can come between the steps.

As a program it is one whole run that a test may kill: `python -m stock.pulling` with one JSON object,
the arguments of `command`.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.patience import PATIENCE
from lab.qemu import Qemu
from qmpbackup.machine import inventory, scratch
from qmpbackup.machine.bystander import standing_by
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.pull import Method, Pull, PulledDisk, method
from qmpbackup.machine.scratch import Scratch
from qmpbackup.machine.view import Instant, View
from qmpbackup.machine.watchdog import Watchdog
from qmpbackup.model import Disk, Vm
from qmpbackup.nbd.reader import Flow
from qmpbackup.plan.instant import Seat
from qmpbackup.plan.names import RunNames
from qmpbackup.undo import UndoStack

CHUNK = 1024 * 1024


@dataclass
class Read:
    """What was read of a disk: its `changed` and `wanted` chunks, the bytes of each chunk, and how
    many bytes came over the wire."""

    changed: list[int]
    wanted: list[int]
    chunks: dict[int, bytes] = field(default_factory=dict)
    fetched: int = 0

    def over(self, base: bytes, chunk: int = CHUNK) -> bytes:
        """The disk, with what was not read taken from an earlier state."""
        count = -(-len(base) // chunk)
        return b"".join(
            self.chunks.get(index, base[index * chunk :][:chunk]) for index in range(count)
        )


class Puller:
    """One run that reads views. A context manager, at whose end everything is undone; `complaints`
    then holds what could not be undone. `bitmaps` are the base bitmaps by disk id."""

    def __init__(
        self,
        vm: "Qemu | _Named",
        folder: Path,
        bitmaps: Mapping[str, str] | None = None,
        *,
        socket: "Path | str" = "",
        way: Method | None = None,
        chunk: int = CHUNK,
        end_marks: bool = True,
    ) -> None:
        self._socket = socket or vm.socket
        self._folder = folder
        self._bitmaps = bitmaps or {}
        self._way = way
        self._chunk = chunk
        self._end_marks = end_marks
        self._undo, self.rollback = UndoStack(), UndoStack()
        self.names = RunNames(secrets.token_hex(3))
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        self.monitor = Monitor.connect(str(self._socket))
        self.vm: Vm = inventory.take(self.monitor).vm
        self.seats = [self._seat(number, disk) for number, disk in enumerate(self.vm.disks)]
        self.view = View(
            self.monitor, self.seats, self.names, teardown=self._undo, rollback=self.rollback
        )
        way = self._way or method(self.vm)
        self.pull = Pull(self.monitor, self.view, self.seats, self.names, way, teardown=self._undo)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.complaints = self._undo.run()
        self.monitor.close()

    def _seat(self, number: int, disk: Disk) -> Seat:
        return Seat(
            disk,
            number,
            new_bitmap=f"qmpbackup:test:{self.names.run}-{number}",
            base_bitmap=self._bitmaps.get(disk.id, ""),
            new_end_mark=f"qmpbackup:test:{self.names.run}-{number}-end" if self._end_marks else "",
            chunk=self._chunk,
        )

    @property
    def bitmaps(self) -> dict[str, str]:
        """The new change bitmaps by disk id, to be the base of the next run."""
        return {seat.disk.id: seat.new_bitmap for seat in self.seats}

    def take(self, samples: Mapping[int, Sequence[int]] | None = None) -> Instant:
        """Everything up to the instant and the exports."""
        self.pull.start()
        scratches = [self._scratch(seat, "scratch") for seat in self.seats]
        staged = self.seats if self.pull.way is Method.STAGED else []
        self.pull.prepare(scratches, samples, [self._scratch(seat, "stage") for seat in staged])
        running = self.vm.running
        with (
            standing_by(self.monitor, self.vm, self.names, self.pull.server),
            Watchdog.start(self.monitor.fileno() if running else None, None) as watchdog,
        ):
            instant = self.view.take(watchdog, running)
        self.pull.serve()
        return instant

    def _scratch(self, seat: Seat, kind: str) -> Scratch:
        return scratch.create(
            seat,
            self._folder,
            self.names.of(kind, seat.number),
            named=not self.monitor.passes_descriptors,
            undo=self._undo,
        )

    def read(
        self, flow: Flow | None = None, after_each: Callable[[], None] = lambda: None
    ) -> dict[str, Read]:
        """Read all disks; `after_each` is called after each chunk."""
        return {seat.disk.id: self._read(seat, flow, after_each) for seat in self.seats}

    def _read(self, seat: Seat, flow: Flow | None, after_each: Callable[[], None]) -> Read:
        with self.pull.open(seat, flow) as disk:
            return collect(disk, self._chunk, after_each)


def collect(
    disk: PulledDisk, size: int = CHUNK, after_each: Callable[[], None] = lambda: None
) -> Read:
    """Read one disk."""
    read = Read(_ones(disk.changed), _ones(disk.wanted))
    for chunk in disk.chunks():
        assert chunk.offset == chunk.index * size
        if chunk.data is None:
            whole = bytes(chunk.length)
            for at in range(chunk.count):
                read.chunks[chunk.index + at] = whole[at * size :][:size]
        else:
            assert chunk.count == 1
            assert len(chunk.data) == chunk.length
            read.chunks[chunk.index] = bytes(chunk.data)
            read.fetched += chunk.length
        chunk.release()
        after_each()
    return read


def _ones(chunks: bytes | bytearray) -> list[int]:
    return [index for index, value in enumerate(chunks) if value]


def command(
    socket: Path,
    folder: Path,
    bitmaps: Mapping[str, str],
    way: Method | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A whole run, with a sample on every disk, as a process of its own."""
    arguments = [str(socket), str(folder), dict(bitmaps), way.value if way else None]
    tests = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "stock.pulling", json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, **(env or {}), "PYTHONPATH": f"{tests}:{tests.parent / 'src'}"},
    )


class _Named:
    """Stands for a VM of which only the socket is known."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket


def main() -> None:
    """The whole run; its new bitmaps go as well, as after a failure."""
    socket, folder, bitmaps, way = json.loads(sys.argv[1])
    run = Puller(_Named(Path(socket)), Path(folder), bitmaps, way=way and Method(way))
    with run:
        run.take(samples={seat.number: [0] for seat in run.seats})
        run.read()
        run.pull.finish()
    complaints = run.complaints
    assert not complaints, complaints


if __name__ == "__main__":
    main()
