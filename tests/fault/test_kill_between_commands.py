# SPDX-License-Identifier: Apache-2.0
"""The tool is killed between any two commands of a run, and nothing is lost or left behind.

The places are enumerated from a recorded run, so a new step is covered by being there. `make test`
takes a spread of them and all around the instant; the slow tests take every one.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up
from lab.disks import CLUSTER, MIB, Disk, create, pattern
from lab.proxy import Place, Proxy
from lab.qemu import Qemu
from lab.scripted import FakeAgent, ScriptedServer

SIZES = {"vda": 10 * MIB, "vdb": 9 * MIB + 512}
DELICATE = frozenset({"stop", "transaction", "cont"})
KINDS = ("first", "full", "inc", "quiesced")


class Scene:
    """A VM with a disk that stores bitmaps and one that cannot, an agent, and a target."""

    def __init__(self, vm: Qemu, agent: FakeAgent, agent_path: Path, folder: Path) -> None:
        self.vm = vm
        self._agent = agent
        self._agent_path = agent_path
        self._folder = folder
        self._writes = 0
        self._targets = 0
        self.target = folder / "none"

    def renew(self, *, first: bool) -> None:
        """Begin a new target, with a full in it unless that is to be the `first`."""
        cli.run("--socket", self.vm.socket, "cleanup", "--remove-bitmaps").check()
        shutil.rmtree(self.target, ignore_errors=True)
        self._targets += 1
        self.target = self._folder / f"target{self._targets}"
        if not first:
            back_up(self.vm, self.target, "full")

    def write(self) -> None:
        """Change something on every disk that was never there before."""
        for disk, size in SIZES.items():
            self._writes += 1
            block = self._writes * 7 % (size // CLUSTER - 1)
            self.vm.write(disk, block * CLUSTER + 512, CLUSTER, self._writes % 255 + 1)

    def run(self, kind: str, hook: Callable[[Proxy, Place], None]) -> list[str]:
        """A run of a kind through a proxy; the names of its commands, empty if it was killed."""
        path = self.vm.folder / "proxy"
        quiesce = ("--quiesce",) if kind == "quiesced" else ()
        level = {"first": "auto", "quiesced": "inc"}.get(kind, kind)
        with Proxy(path, self.vm.socket, hook) as proxy:
            command = ("backup", "--level", level, "--target", self.target, *quiesce)
            result = cli.run("--socket", path, "--agent-socket", self._agent_path, *command)
            if not proxy.killed:
                result.check()
            self._wait_for_rescue()
        return [] if proxy.killed else proxy.log

    def _wait_for_rescue(self) -> None:
        self.vm.qmp.poll(lambda: self.vm.qmp("query-status")["running"])
        self._agent.wait(lambda: not self._agent.frozen)

    def _next(self, level: str) -> str:
        """A run past the proxy that must succeed; the id of its point."""
        command = ("backup", "--level", level, "--target", self.target, "--json")
        agent = ("--agent-socket", self._agent_path)
        result = cli.run("--socket", self.vm.socket, *agent, *command).check()
        return str(json.loads(result.out)["point"]["id"])

    def survive(self, kind: str, place: Place) -> bool:
        """Kill a run at a place, then look whether the next makes good; `False` if it ended before."""
        self.write()
        killed = not self.run(kind, lambda proxy, at: kill_at(proxy, at, place))
        if killed:
            self.write()
        point = self._next("auto" if kind == "first" else "inc")
        assert_clean(self.vm, self.target)
        live = {disk: self.vm.contents(disk) for disk in SIZES}
        assert_restores(self.target, point, live, self._folder)
        shutil.rmtree(self._folder / f"restored-{point}")
        return killed


def kill_at(proxy: Proxy, at: Place, place: Place) -> None:
    """Kill the client when it gets to a place for the first time."""
    if not proxy.killed and (at.number, at.when) == (place.number, place.when):
        proxy.kill_client()


@pytest.fixture
def scene(start_qemu: Callable[..., Qemu], tmp_path: Path) -> Iterator[Scene]:
    images = tmp_path / "images"
    images.mkdir()
    disks = [
        Disk("vda", create(images / "a", SIZES["vda"], contents=pattern(SIZES["vda"], 1))),
        Disk("vdb", create(images / "b", SIZES["vdb"], "raw"), "raw"),
    ]
    vm = start_qemu(disks, name="doomed")
    agent = FakeAgent()
    with ScriptedServer(vm.folder / "agent", agent.serve):
        yield Scene(vm, agent, vm.folder / "agent", tmp_path)


def all_places(names: Sequence[str]) -> list[Place]:
    """Every place of a recorded run, and some more in case another takes more turns."""
    numbered = list(enumerate([*names, *["beyond"] * 5]))
    return [Place(number, when, name) for number, name in numbered for when in ("before", "after")]


def some_places(names: Sequence[str], step: int) -> list[Place]:
    """All before and after what is delicate, and every so many of the others."""
    last = len(names) - 1
    return [
        place
        for index, place in enumerate(all_places(names))
        if place.number <= last
        and (place.command in DELICATE or index % step == 0 or place.number == last)
    ]


def kill_at_all(scene: Scene, kind: str, choose: Callable[[Sequence[str]], list[Place]]) -> int:
    scene.renew(first=kind == "first")
    places = choose(scene.run(kind, lambda _proxy, _at: None))
    print(f"{kind}: killed at", *(f"{at.when} {at.number} {at.command}," for at in places))
    kills = 0
    for index, place in enumerate(places):
        if kind == "first" or index % 8 == 0:
            scene.renew(first=kind == "first")
        try:
            kills += scene.survive(kind, place)
        except BaseException as error:
            error.add_note(f"{kind} run killed {place}")
            raise
    return kills


@pytest.mark.parametrize("kind", ["full", "quiesced"])
def test_killed_at_a_spread_of_places(scene: Scene, kind: str) -> None:
    assert kill_at_all(scene, kind, lambda names: some_places(names, step=19)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_everywhere(scene: Scene, kind: str) -> None:
    assert kill_at_all(scene, kind, all_places) > 60
