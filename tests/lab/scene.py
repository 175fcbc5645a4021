# SPDX-License-Identifier: Apache-2.0
"""A VM and a target where runs are broken again and again, and the question whether the next makes
good."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores
from lab.disks import CLUSTER, MIB, Disk, create, pattern
from lab.qemu import Qemu
from lab.scripted import FakeAgent, ScriptedServer

SIZES = {"vda": 10 * MIB, "vdb": 9 * MIB + 512}
KINDS = ("first", "full", "inc", "quiesced")
"""The runs that are broken: a target's first full, a later one, an incremental, one with a freeze."""


class Scene:
    """A VM with a disk that stores bitmaps and one that cannot, an agent, and a target."""

    def __init__(self, vm: Qemu, agent: FakeAgent, agent_path: Path, folder: Path) -> None:
        self.vm = vm
        self.target = folder / "none"
        self._agent = agent
        self._agent_path = agent_path
        self._folder = folder
        self._writes = 0
        self._targets = 0

    def renew(self, kind: str) -> None:
        """Begin a new target, with a full in it unless that is to be the `first`."""
        cli.run("--socket", self.vm.socket, "cleanup", "--remove-bitmaps").check()
        shutil.rmtree(self.target, ignore_errors=True)
        self._targets += 1
        self.target = self._folder / f"target{self._targets}"
        if kind != "first":
            cli.run(*self.arguments("full", self.vm.socket)).check()

    def write(self) -> None:
        """Change something on every disk that was never there before."""
        for disk, size in SIZES.items():
            self._writes += 1
            block = self._writes * 7 % (size // CLUSTER - 1)
            self.vm.write(disk, block * CLUSTER + 512, CLUSTER, self._writes % 255 + 1)

    def arguments(self, kind: str, socket: Path) -> tuple[cli.Argument, ...]:
        """The command line of a run of a kind (or of a level)."""
        quiesce = ("--quiesce",) if kind == "quiesced" else ()
        level = {"first": "auto", "quiesced": "inc"}.get(kind, kind)
        ends = ("--socket", socket, "--agent-socket", self._agent_path)
        return (*ends, "backup", "--level", level, "--target", self.target, *quiesce)

    def wait_for_rescue(self) -> None:
        """Wait until the VM runs and its guest is thawed, which is the watchdog's work."""
        self.vm.qmp.poll(lambda: self.vm.qmp("query-status")["running"])
        self._agent.wait(lambda: not self._agent.frozen)

    def make_good(self, kind: str) -> None:
        """The next run succeeds (as an incremental, where there ever was a full), leaves nothing of
        the broken one, and its point is the disks as they are."""
        self.wait_for_rescue()
        self.write()
        level = "auto" if kind == "first" else "inc"
        result = cli.run(*self.arguments(level, self.vm.socket), "--json").check()
        point = str(json.loads(result.out)["point"]["id"])
        assert_clean(self.vm, self.target)
        live = {disk: self.vm.contents(disk) for disk in SIZES}
        assert_restores(self.target, point, live, self._folder)
        shutil.rmtree(self._folder / f"restored-{point}")


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """A scene with its files in `folder`."""
    images = folder / "images"
    images.mkdir()
    disks = [
        Disk("vda", create(images / "a", SIZES["vda"], contents=pattern(SIZES["vda"], 1))),
        Disk("vdb", create(images / "b", SIZES["vdb"], "raw"), "raw"),
    ]
    agent = FakeAgent()
    with (
        Qemu(disks, name="doomed") as vm,
        ScriptedServer(vm.folder / "agent", agent.serve),
    ):
        yield Scene(vm, agent, vm.folder / "agent", folder)
