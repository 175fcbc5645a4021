# SPDX-License-Identifier: Apache-2.0
"""A VM and a target where runs are broken again and again, and the question whether the next makes
good."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, is_copying
from lab.disks import CLUSTER, MIB, Disk, create, pattern
from lab.qemu import Qemu
from lab.repositories import Repository, Target, environment_of
from lab.scripted import FakeAgent, ScriptedServer
from stock.repositories import repository

SIZES = {"vda": 10 * MIB, "vdb": 9 * MIB + 512}
Where = Literal["directory", "repository"]
WHERE: tuple[Where, ...] = ("directory", "repository")

KINDS = ("first", "full", "inc", "quiesced")
"""The runs that are broken: a target's first full, a later one, an incremental, one with a freeze."""


class Scene:
    """A VM with a disk that stores bitmaps and one that cannot, an agent, and a target.

    `place` is the target, whichever kind it is; `target` its folder.
    """

    def __init__(
        self, vm: Qemu, agent: FakeAgent, agent_path: Path, folder: Path, where: Where
    ) -> None:
        self.vm = vm
        self.target = folder / "none"
        self.repository: Repository | None = None
        self._where = where
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
        if self._where == "repository":
            self.repository = repository(self.target)
        if kind != "first":
            self.run("full").check()

    @property
    def place(self) -> Target:
        """The target."""
        return self.repository or self.target

    @property
    def environment(self) -> Mapping[str, str]:
        """What a run needs to know of its target."""
        return environment_of(self.place)

    def run(self, kind: str, *more: cli.Argument, socket: Path | None = None) -> cli.Result:
        """A run of a kind (or of a level), however it ends."""
        arguments = self.arguments(kind, socket or self.vm.socket)
        return cli.run(*arguments, *more, env=self.environment)

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
        return (*ends, "backup", "--level", level, "--target", str(self.place), *quiesce)

    def wait_for_rescue(self) -> None:
        """Wait until the VM runs and its guest is thawed, which is the watchdog's work."""
        self.vm.qmp.poll(lambda: self.vm.qmp("query-status")["running"])
        self._agent.wait(lambda: not self._agent.frozen)

    @contextmanager
    def long_run(self, *more: cli.Argument) -> Iterator[cli.Running]:
        """A run that has begun to copy and would go on copying for minutes."""
        for block in range(64):
            self.vm.write("vda", block * CLUSTER, CLUSTER, 3)
        arguments = self.arguments("inc", self.vm.socket)
        with cli.start(
            *arguments, "--speed-limit", "10000", *more, env=self.environment
        ) as running:
            self.vm.qmp.poll(running.unless_over(lambda: is_copying(self.vm)))
            yield running

    def make_good(self, kind: str) -> None:
        """The next run succeeds (as an incremental, where there ever was a full), leaves nothing of
        the broken one, and its point is the disks as they are."""
        self.wait_for_rescue()
        self.write()
        level = "auto" if kind == "first" else "inc"
        result = self.run(level, "--json").check()
        point = str(json.loads(result.out)["point"]["id"])
        assert_clean(self.vm, self.place)
        live = {disk: self.vm.contents(disk) for disk in SIZES}
        assert_restores(self.place, point, live, self._folder)
        shutil.rmtree(self._folder / f"restored-{point}", ignore_errors=True)


@contextmanager
def scene(folder: Path, where: Where = "directory", *, args: Sequence[str] = ()) -> Iterator[Scene]:
    """A scene with its files in `folder`; `args` are added to QEMU's command line."""
    images = folder / "images"
    images.mkdir()
    disks = [
        Disk("vda", create(images / "a", SIZES["vda"], contents=pattern(SIZES["vda"], 1))),
        Disk("vdb", create(images / "b", SIZES["vdb"], "raw"), "raw"),
    ]
    agent = FakeAgent()
    with (
        Qemu(disks, name="doomed", args=args) as vm,
        ScriptedServer(vm.folder / "agent", agent.serve),
    ):
        yield Scene(vm, agent, vm.folder / "agent", folder, where)
