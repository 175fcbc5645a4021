# SPDX-License-Identifier: Apache-2.0
"""The guest writes before every single command of a run, on every disk, and nothing is lost."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean, manifests
from lab.backups import assert_restores, back_up, restored
from lab.disks import CLUSTER, MIB, Disk, create, pattern
from lab.load import Write
from lab.proxy import Place, Proxy
from lab.qemu import Qemu, StartQemu
from lab.repositories import Target, environment_of
from stock.repositories import repository

SIZES = {"vda": 10 * MIB, "vdb": 9 * MIB + 512, "vdc": 12 * MIB}
LEVELS = ("full", "inc", "diff", "copy")
LEVELS_OF_REPOSITORIES = ("full", "inc", "inc", "copy")
FEW_BLOCKS = 40


@dataclass
class Injector:
    """Writes a block of each disk before each command, of few blocks, so that most are written
    again and again; every fifth is made zero as a guest's trim does. `standstills` holds, for each
    run, how many writes were done when its VM was stopped and when it ran again."""

    vm: Qemu
    seed: int
    log: list[Write] = field(default_factory=list)
    standstills: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chosen = random.Random(self.seed)  # noqa: S311 - repeatable on purpose
        self._paths = {disk: self.vm.qdev(disk) for disk in SIZES}
        self._stopped_at: int | None = None

    def __call__(self, _proxy: Proxy, at: Place) -> None:
        """What the proxy calls at each place."""
        if at.when == "before":
            for disk, path in self._paths.items():
                self._write(disk, path)
        elif at.command == "stop":
            self._stopped_at = len(self.log)
        elif at.command == "cont" and self._stopped_at is not None:
            self.standstills.append((self._stopped_at, len(self.log)))
            self._stopped_at = None

    def _write(self, disk: str, path: str) -> None:
        number = len(self.log) + 1
        block = self._chosen.randrange(FEW_BLOCKS) * 3
        byte = 0 if number % 5 == 0 else self._chosen.randrange(1, 256)
        # qemu-io's trim kills QEMU 7.2 where an iothread has the disk.
        what = f"write -P {byte}" if byte or disk == "vdc" else "write -z -u"
        self.vm.qemu_io_at(path, f"{what} {block * CLUSTER} {CLUSTER}")
        in_pause = self._stopped_at is not None
        self.log.append(Write(number, disk, block, byte, in_pause))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_write_before_every_command_is_in_one_point_or_the_next(
    start_qemu: StartQemu, tmp_path: Path, seed: int
) -> None:
    write_everywhere(start_qemu, tmp_path, tmp_path / "target", LEVELS, seed)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_write_before_every_command_of_a_run_into_a_repository(
    start_qemu: StartQemu, tmp_path: Path, seed: int
) -> None:
    target = repository(tmp_path / "target")
    write_everywhere(start_qemu, tmp_path, target, LEVELS_OF_REPOSITORIES, seed)
    target.assert_whole(read_data=True)


def write_everywhere(
    start_qemu: StartQemu,
    tmp_path: Path,
    target: Target,
    levels: Sequence[str],
    seed: int,
) -> None:
    """Make points while a write comes before every command; each holds its instant."""
    vm = start_qemu(
        [
            Disk("vda", create(tmp_path / "a", SIZES["vda"], contents=pattern(SIZES["vda"], seed))),
            Disk("vdb", create(tmp_path / "b", SIZES["vdb"], "raw"), "raw"),
            Disk("vdc", create(tmp_path / "c", SIZES["vdc"]), iothread="io0"),
        ],
        name="busy",
        iothreads=["io0"],
        firmware="seabios" if seed == 2 else "halt",
    )
    before = {disk: vm.contents(disk) for disk in SIZES}
    injector = Injector(vm, seed)
    for level in levels:
        path = vm.folder / "proxy"
        with Proxy(path, vm.socket, injector):
            command = ("backup", "--level", level, "--target", str(target))
            cli.run("--socket", path, *command, env=environment_of(target)).check()
    last = back_up(vm, target, "inc")
    live = {disk: vm.contents(disk) for disk in SIZES}
    assert_restores(target, last["id"], live, tmp_path)
    assert_clean(vm, target)
    points = manifests(target)[:-1]
    assert len(points) == len(injector.standstills) == len(levels)
    for point, (stopped, went_on) in zip(points, injector.standstills, strict=True):
        found = restored(target, point["id"], tmp_path)
        for disk, first in before.items():
            writes = [write for write in injector.log[:went_on] if write.disk == disk]
            wrong = wrong_blocks(first, writes, stopped, found[disk])
            assert wrong == [], f"{point['level']} of {disk}"


def wrong_blocks(before: bytes, writes: Sequence[Write], stopped: int, found: bytes) -> list[int]:
    """Blocks that hold anything else than at the instant: what was written before the VM stopped
    last, or, as no guest's write falls into the pause, one of the writes that we did in it."""
    state = {
        block: [before[block * CLUSTER :][:CLUSTER]] for block in range(len(before) // CLUSTER)
    }
    for write in writes:
        value = bytes([write.byte]) * CLUSTER
        states = state[write.block]
        state[write.block] = [*states, value] if write.number > stopped else [value]
    return [
        block for block, states in state.items() if found[block * CLUSTER :][:CLUSTER] not in states
    ]
