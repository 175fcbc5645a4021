# SPDX-License-Identifier: Apache-2.0
"""Writes while backups run, and the question whether a point shows one instant of them."""

import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from lab.disks import CLUSTER
from lab.patience import PATIENCE
from lab.qemu import Qemu
from lab.qmp import Monitor


@dataclass(frozen=True)
class Write:
    """One write of the load: `number` counts over all disks. `in_pause`: it may have been carried
    out while the VM was stopped, as no guest's write is."""

    number: int
    disk: str
    block: int
    byte: int
    in_pause: bool


@dataclass
class Writer:
    """Writes random blocks of a VM's disks, one after the other, through the test's monitor.

    Use as a context manager; while it runs the test must not use `vm.qmp`. Each write covers one
    block of `block_size`. `rate` is writes a second at most. What was written is in `log`. It
    rests while the VM is stopped.
    """

    vm: Qemu
    sizes: Mapping[str, int]
    seed: int = 1
    block_size: int = CLUSTER
    rate: float = 500
    log: list[Write] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer")
        self._failure: BaseException | None = None
        self._chosen = random.Random(self.seed)  # noqa: S311 - repeatable on purpose

    def __enter__(self) -> Self:
        self._paths = {disk: self.vm.qdev(disk) for disk in self.sizes}
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the load and wait for its last write. Raises what went wrong in it."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def wait_for(self, writes: int, timeout: float = PATIENCE) -> None:
        """Wait until this many more writes are done."""
        aim = len(self.log) + writes
        deadline = time.monotonic() + timeout
        while len(self.log) < aim:
            assert self._thread.is_alive(), f"the load has ended: {self._failure}"
            assert time.monotonic() < deadline, f"only {len(self.log)} writes of {aim}"
            time.sleep(0.005)

    def _run(self) -> None:
        try:
            number = 0
            while not self._over.wait(1 / self.rate):
                if _wait_until_running(self.vm.qmp):
                    number += 1
                    self._write(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._failure = error

    def _write(self, number: int) -> None:
        monitor = self.vm.qmp
        disk = self._chosen.choice(list(self.sizes))
        block = self._chosen.randrange(self.sizes[disk] // self.block_size)
        byte = self._chosen.randrange(1, 256)
        events = len(monitor.events)
        command = f"write -P {byte} {block * self.block_size} {self.block_size}"
        self.vm.qemu_io_at(self._paths[disk], command)
        stopped = any(event["event"] == "STOP" for event in monitor.events[events:])
        self.log.append(Write(number, disk, block, byte, stopped))


def _wait_until_running(monitor: Monitor) -> bool:
    """Whether the VM runs; where it does not, after a short wait."""
    if monitor("query-status")["running"]:
        return True
    time.sleep(0.002)
    return False


def instants(
    before: Mapping[str, bytes],
    log: Sequence[Write],
    point: Mapping[str, bytes],
    block_size: int = CLUSTER,
) -> list[int]:
    """After how many writes of the log all disks looked as in `point`; empty where never.

    `before` is what the disks held when the load began. The right answer is one instant (or several
    where writes changed nothing): a point whose disks show different instants has none.
    """
    possible = [True] * (len(log) + 1)
    for disk, first in before.items():
        if len(first) != len(point[disk]):
            return []
        writes: dict[int, list[tuple[int, Write]]] = {}
        for index, write in enumerate(log, start=1):
            if write.disk == disk:
                writes.setdefault(write.block, []).append((index, write))
        for start in range(0, len(first), block_size):
            block = start // block_size
            states = [
                first[start : start + block_size],
                *(bytes([write.byte]) * block_size for _, write in writes.get(block, [])),
            ]
            _exclude(possible, states, writes.get(block, []), point[disk][start:][:block_size])
    return [count for count, still in enumerate(possible) if still]


def _exclude(
    possible: list[bool],
    states: Sequence[bytes],
    writes: Sequence[tuple[int, Write]],
    found: bytes,
) -> None:
    """Strike out the counts at which this block did not hold what was found.

    A write in a pause may count as done already at the instant, or not yet: which side of the
    instant it fell on differs from disk to disk, and no guest could tell.
    """
    starts = [0, *(index for index, _ in writes)]
    ends = [*(index for index, _ in writes), len(possible)]
    doubtful = [False, *(write.in_pause for _, write in writes)]
    for at, (start, end) in enumerate(zip(starts, ends, strict=True)):
        allowed: Iterable[int] = (at,)
        if doubtful[at]:
            allowed = (at - 1, at)
        right = any(states[which] == found for which in allowed)
        early = at + 1 < len(states) and doubtful[at + 1] and states[at + 1] == found
        if not right:
            for count in range(start, end):
                if not (early and count == end - 1):
                    possible[count] = False
