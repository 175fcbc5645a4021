# SPDX-License-Identifier: Apache-2.0
"""Anything, in any order: a state machine does what users, guests and accidents do to a real VM, and a
model says what every point must hold.

`make test` takes a few fixed sequences; `make soak MINUTES=n` takes new ones for as long as one likes,
and prints the seed of a failure: `make soak SEED=…` takes just that again.
"""

import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lab.disks import CLUSTER, MIB
from lab.world import Accident, Damage, Meddling, World

MINUTES = float(os.environ.get("QMPBACKUP_SOAK_MINUTES", "0"))
SEED = os.environ.get("QMPBACKUP_SOAK_SEED", "")

BLOCKS = st.integers(0, 190)
LENGTHS = st.integers(1, 24)
DISKS = st.sampled_from(["vda", "vdb"])
LEVELS = st.sampled_from(["auto", "inc", "diff", "full", "copy"])
SIZES = st.sampled_from([9 * MIB, 10 * MIB, 10 * MIB + 512, 11 * MIB, 12 * MIB])
ACCIDENTS = st.sampled_from(list[Accident](["kill the tool", "kill QEMU", "cut the connection"]))
DAMAGES = st.sampled_from(list[Damage](["flip", "truncate", "remove"]))


class Machine(RuleBasedStateMachine):
    """One life of a VM and its target. Subclasses say in which `folder`."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self._here = Path(tempfile.mkdtemp(dir=self.folder))
        self._world = World(self._here)
        self._world.__enter__()

    def teardown(self) -> None:
        try:
            if self._world.vm.running:
                self._final()
        finally:
            self._world.__exit__(None, None, None)
            shutil.rmtree(self._here)

    def _final(self) -> None:
        """Damage is found; all else restores, and all once it is put right."""
        world = self._world
        world.verify()
        world.repair()
        world.back_up("auto")
        world.verify()
        for point in list(world.points):
            world.restore(point)

    @initialize()
    def begin(self) -> None:
        self._world.back_up("full")

    @invariant()
    def all_is_well(self) -> None:
        self._world.check()

    # The guest

    @rule(disk=DISKS, block=BLOCKS, blocks=LENGTHS, byte=st.integers(1, 255))
    def write(self, disk: str, block: int, blocks: int, byte: int) -> None:
        self._world.write(disk, block, blocks, byte)

    @rule(disk=DISKS, block=BLOCKS, blocks=LENGTHS, unmap=st.booleans())
    def clear(self, disk: str, block: int, blocks: int, unmap: bool) -> None:
        self._world.clear(disk, block, blocks, unmap=unmap)

    @rule(disk=DISKS, block=BLOCKS, blocks=LENGTHS)
    def discard(self, disk: str, block: int, blocks: int) -> None:
        self._world.discard(disk, block, blocks)

    # Backups

    @rule(level=LEVELS)
    def back_up(self, level: str) -> None:
        self._world.back_up(level)

    @rule(number=st.integers(0, 80), what=st.sampled_from(list[Accident](["write", "grow"])))
    def back_up_while_things_happen(self, number: int, what: Accident) -> None:
        self._world.back_up("auto", Meddling(what, number, "after"))

    @rule(
        level=LEVELS,
        what=ACCIDENTS,
        number=st.integers(0, 80),
        when=st.sampled_from(["before", "after"]),
    )
    def back_up_and_break(self, level: str, what: Accident, number: int, when: Any) -> None:
        self._world.back_up(level, Meddling(what, number, when))

    # QEMU and its disks

    @rule()
    def restart(self) -> None:
        self._world.restart()

    @rule()
    def kill(self) -> None:
        self._world.kill()

    @rule(disk=DISKS, size=SIZES)
    def resize(self, disk: str, size: int) -> None:
        self._world.resize(disk, size)

    @rule(disk=DISKS, by=st.sampled_from([1, 8, 30]))
    def shrink_and_grow(self, disk: str, by: int) -> None:
        size = len(self._world.live[disk])
        self._world.resize(disk, size - by * CLUSTER // 2, size)

    @rule(disk=DISKS)
    def snapshot(self, disk: str) -> None:
        self._world.snapshot(disk)

    @precondition(lambda self: self._world.overlaid)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self._world.commit(data.draw(st.sampled_from(self._world.overlaid)))

    @precondition(lambda self: "vdc" not in self._world.disks)
    @rule()
    def plug(self) -> None:
        self._world.plug()

    @precondition(lambda self: "vdc" in self._world.disks)
    @rule()
    def unplug(self) -> None:
        self._world.unplug()

    @precondition(lambda self: "vda" not in self._world.overlaid)
    @rule()
    def copy_image(self) -> None:
        self._world.copy_image("vda")

    @precondition(lambda self: self._world.copied)
    @rule()
    def put_older_copy_back(self) -> None:
        self._world.put_back(self._world.copied[0])

    # The target

    @rule(file=st.integers(0, 50), how=DAMAGES, at=st.integers(0, 4 * MIB), again=st.booleans())
    def damage(self, file: int, how: Damage, at: int, again: bool) -> None:
        self._world.damage(file, how, at)
        self._world.verify()
        if again:
            self._world.repair()

    @precondition(lambda self: self._world.damaged)
    @rule()
    def repair(self) -> None:
        self._world.repair()

    @rule(disk=st.sampled_from(["vda", "vdb", "vdc"]), keep=st.booleans())
    def merge(self, disk: str, keep: bool) -> None:
        self._world.merge(disk, keep=keep)

    @precondition(lambda self: self._world.points)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        self._world.restore(data.draw(st.sampled_from(list(self._world.points))))


def run(folder: Path, chosen: int, examples: int, steps: int) -> None:
    """Let machines live that follow from a seed."""
    machine = seed(chosen)(type("Life", (Machine,), {"folder": folder}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate],  # to shrink what takes seconds would take hours
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_few_lives(tmp_path: Path) -> None:
    run(tmp_path, 1, examples=3, steps=18)


@pytest.mark.skipif(not MINUTES, reason="make soak MINUTES=n")
def test_soak(tmp_path: Path) -> None:
    deadline = time.monotonic() + 60 * MINUTES
    while True:
        chosen = int(SEED) if SEED else random.randrange(2**32)  # noqa: S311
        print(f"seed {chosen}", flush=True)
        try:
            run(tmp_path, chosen, examples=5, steps=30)
        except BaseException as error:
            error.add_note(f"again: make soak SEED={chosen}")
            raise
        if SEED or time.monotonic() > deadline:
            return
