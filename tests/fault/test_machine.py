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

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from lab.disks import CLUSTER, MIB
from lab.folder_world import FolderWorld
from lab.proxy import When
from lab.rig import SHARED
from lab.world import Accident, Damage, Meddling, World
from stock.repository_world import RepositoryWorld
from stock.scene import WHERE, Where

MINUTES = float(os.environ.get("QMPBACKUP_SOAK_MINUTES", "0"))
SEED = os.environ.get("QMPBACKUP_SOAK_SEED", "")

BLOCKS = st.integers(0, 190)
BYTES = st.integers(1, 255)
LENGTHS = st.integers(1, 24)
DISKS = st.sampled_from(["vda", "vdb"])
GUEST = st.sampled_from(["write", "zero", "unmap", "discard"])
LEVELS = st.sampled_from(["inc", "auto", "diff", "full", "copy"])
THEN = st.sampled_from(["inc", "auto", "diff", "", "", ""])
SIZES = st.sampled_from([9 * MIB, 10 * MIB, 10 * MIB + 512, 11 * MIB, 12 * MIB])
ACCIDENTS = st.sampled_from(
    list[Accident](
        [
            *("kill the tool", "kill QEMU", "cut the connection", "write", "grow"),
            *("fill the target", "fill the images", "unmount the target"),
        ]
    )
)
WHEN = st.sampled_from(list[When](["before", "after"]))
DAMAGES = st.sampled_from(list[Damage](["flip", "truncate", "remove"]))


class Machine(RuleBasedStateMachine):
    """One life of a VM and its target. Subclasses say in which `folder`, and of which kind."""

    folder: Path
    where: Where

    def __init__(self) -> None:
        super().__init__()
        self._here = Path(tempfile.mkdtemp(dir=self.folder))
        kind: type[World] = FolderWorld if self.where == "directory" else RepositoryWorld
        self._world = kind(self._here)
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
        assert world.marks == [], "what is whole again still counts as damaged"
        for point in list(world.points):
            world.restore(point)

    @initialize()
    def begin(self) -> None:
        self._world.back_up("full")

    @invariant()
    def all_is_well(self) -> None:
        self._world.check()

    # The guest

    @rule(disk=DISKS, what=GUEST, block=BLOCKS, blocks=LENGTHS, byte=BYTES, then=THEN)
    def guest(self, disk: str, what: str, block: int, blocks: int, byte: int, then: str) -> None:
        if what == "write":
            self._world.write(disk, block, blocks, byte)
        elif what == "discard":
            self._world.discard(disk, block, blocks)
        else:
            self._world.clear(disk, block, blocks, unmap=what == "unmap")
        self._then(then)

    def _then(self, level: str) -> None:
        """Most things that happen are followed by a backup: there has to be something to get wrong."""
        if level:
            self._world.back_up(level)

    # Backups

    @rule(level=LEVELS, block=BLOCKS, byte=BYTES)
    def back_up(self, level: str, block: int, byte: int) -> None:
        for disk in self._world.disks:
            self._world.write(disk, block, 1, byte)
        self._world.back_up(level)

    @rule(level=LEVELS, what=ACCIDENTS, number=st.integers(0, 80), when=WHEN, then=THEN)
    def back_up_with_accident(
        self, level: str, what: Accident, number: int, when: When, then: str
    ) -> None:
        self._world.back_up(level, Meddling(what, number, when))
        self._then(then)

    # QEMU and its disks

    @rule(what=st.sampled_from(["restart", "kill", "copy an image", "put it back"]), then=THEN)
    def machine(self, what: str, then: str) -> None:
        world = self._world
        if what == "restart":
            world.restart()
        elif what == "kill":
            world.kill()
        elif what == "put it back" and world.copied:
            world.put_back(world.copied[0])
        elif "vda" not in world.overlaid:
            world.copy_image("vda")
        self._then(then)

    @rule(then=THEN)
    def plug(self, then: str) -> None:
        self._plug_or_unplug("vdc")
        self._then(then)

    @rule(plug=st.booleans(), block=BLOCKS, blocks=LENGTHS, byte=BYTES, then=THEN)
    def share(self, plug: bool, block: int, blocks: int, byte: int, then: str) -> None:
        """A disk that another VM has, too, and writes to."""
        if plug or SHARED not in self._world.disks:
            self._plug_or_unplug(SHARED)
        else:
            self._world.write_from_elsewhere(block, blocks, byte)
        self._then(then)

    def _plug_or_unplug(self, disk: str) -> None:
        if disk in self._world.disks:
            self._world.unplug(disk)
        else:
            self._world.plug(disk)

    @rule(disk=DISKS, size=SIZES, by=st.sampled_from([0, 1, 8, 30]), then=THEN)
    def resize(self, disk: str, size: int, by: int, then: str) -> None:
        """To another size, or smaller `by` some sectors or clusters and back."""
        before = len(self._world.live[disk])
        sizes = [before - by * CLUSTER // 2, before] if by else [size]
        self._world.resize(disk, *sizes)
        self._then(then)

    @rule(disk=DISKS, up=st.booleans(), then=THEN)
    def snapshot(self, disk: str, up: bool, then: str) -> None:
        if up or disk not in self._world.overlaid:
            self._world.snapshot(disk)
        else:
            self._world.commit(disk)
        self._then(then)

    @rule(disk=DISKS, byte=BYTES, then=THEN)
    def exchange_base(self, disk: str, byte: int, then: str) -> None:
        if disk not in self._world.overlaid:
            self._world.snapshot(disk)
            self._then(then)
        self._world.exchange_base(disk, byte)
        self._then(then)

    # The target

    @rule(file=st.integers(0, 50), how=DAMAGES, at=st.integers(0, 4 * MIB), then=THEN)
    def damage(self, file: int, how: Damage, at: int, then: str) -> None:
        self._world.damage(file, how, at)
        self._world.verify()
        self._then(then)

    @rule(then=THEN)
    def repair(self, then: str) -> None:
        self._world.repair()
        self._then(then)

    @rule(disk=st.sampled_from(["vda", "vdb", "vdc"]), keep=st.booleans(), then=THEN)
    def merge(self, disk: str, keep: bool, then: str) -> None:
        self._world.merge(disk, keep=keep)
        self._then(then)

    @rule(last=st.integers(1, 4), then=THEN)
    def prune(self, last: int, then: str) -> None:
        self._world.prune(last)
        self._then(then)

    @rule(byte=BYTES)
    def visit(self, byte: int) -> None:
        self._world.visit(byte)

    @rule(number=st.integers(0, 50))
    def restore(self, number: int) -> None:
        # What is drawn must not depend on the world: which points there are is a matter of when
        # exactly somebody was killed.
        points = list(self._world.points)
        if points:
            self._world.restore(points[number % len(points)])


def run(folder: Path, where: Where, chosen: int, examples: int, steps: int) -> None:
    """Let machines live that follow from a seed."""
    machine = seed(chosen)(type("Life", (Machine,), {"folder": folder, "where": where}))
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


@pytest.mark.parametrize(("where", "examples"), [("directory", 5), ("repository", 2)])
def test_a_few_lives(tmp_path: Path, where: Where, examples: int) -> None:
    run(tmp_path, where, 1, examples=examples, steps=16)


@pytest.mark.skipif(not MINUTES, reason="make soak MINUTES=n")
def test_soak(tmp_path: Path) -> None:
    deadline = time.monotonic() + 60 * MINUTES
    while True:
        chosen = int(SEED) if SEED else random.randrange(2**32)  # noqa: S311
        print(f"seed {chosen}", flush=True)
        try:
            for where in WHERE:
                run(tmp_path, where, chosen, examples=3, steps=30)
        except BaseException as error:
            error.add_note(f"again: make soak SEED={chosen}")
            raise
        if SEED or time.monotonic() > deadline:
            return
