# SPDX-License-Identifier: Apache-2.0
"""A VM with its target, whatever befalls them, and a model that knows what every point must hold.

`World` does what users, guests, administrators and accidents do; each of its methods leaves the VM idle
and asserts what must be so. The model holds the bytes of all disks now, the bytes of each point, and for
each disk whether the product may still refuse to build on what it has.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab import cli
from lab.aftermath import PREFIX, manifests
from lab.backups import leftovers
from lab.cli import Result
from lab.disks import CLUSTER, Disk, create, first_difference
from lab.proxy import Place, Proxy, When
from lab.qemu import Qemu
from lab.qmp import QmpError
from lab.repositories import Target, environment_of
from lab.rig import SHARED, SIZE, Rig, Trust
from lab.small import FileSystem

ELSEWHERE = "elsewhere"
"""What another host is called."""
DONE, USAGE, DEGRADED, NO_INCREMENTAL, VM, STORAGE, DAMAGED, KILLED = 0, 2, 3, 4, 6, 7, 8, -9

Accident = Literal[
    "kill the tool",
    "kill QEMU",
    "cut the connection",
    "write",
    "grow",
    "fill the target",
    "fill the images",
    "unmount the target",
]
Damage = Literal["flip", "truncate", "remove"]

_CODES: dict[Accident | None, set[int]] = {
    None: {DONE},
    "write": {DONE},
    "grow": {DONE, VM},
    "kill the tool": {DONE, KILLED},
    "kill QEMU": {DONE, DEGRADED, VM},
    "cut the connection": {DONE, DEGRADED, VM},
    "fill the target": {DONE, STORAGE},
    "fill the images": {DONE, STORAGE},
    "unmount the target": {DONE, STORAGE},
}


@dataclass(frozen=True)
class Meddling:
    """An accident at a place of a run: at its monitor command `number`; none if it is over by then."""

    what: Accident
    number: int
    when: When


class Album:
    """Contents of disks, of which equal blocks are held once."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, bytes] = {}

    def keep(self, contents: bytes) -> "Picture":
        """Remember."""
        blocks = (contents[at : at + CLUSTER] for at in range(0, len(contents), CLUSTER))
        return Picture(tuple(self._blocks.setdefault(each, each) for each in blocks))


@dataclass(frozen=True)
class Picture:
    """Contents of a disk at some time."""

    blocks: tuple[bytes, ...]

    @property
    def contents(self) -> bytes:
        """All bytes."""
        return b"".join(self.blocks)


Pictures = Mapping[str, Picture]


class World(Rig, ABC):
    """See the module. A context manager; `folder` is empty and takes everything. Subclasses know a
    kind of target."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.storage = FileSystem(folder / "target")
        self.points: dict[str, Pictures] = {}
        self.damaged: dict[Path, bytes] = {}
        self._had: dict[str, set[str]] = {}  # the disks of the VM when a point was made
        self._album = Album()
        self._tidy = True

    def _begin(self) -> None:
        self._stack.enter_context(self.storage)
        super()._begin()

    # What depends on the kind of target

    @property
    @abstractmethod
    def target(self) -> Target:
        """Where the points go."""

    @abstractmethod
    def _files(self) -> object:
        """The state of everything in the target but locks."""

    @abstractmethod
    def _assert_only_named(self, points: list[dict[str, Any]]) -> None:
        """The target holds what its points are made of, and nothing else."""

    @property
    def marks(self) -> list[str]:
        """What the target says to be damaged."""
        return []

    def _needed(self, _point: str) -> set[Path]:
        """The files that a point is made of, where they can be damaged."""
        return set()

    def damage(self, file: int, how: Damage, at: int) -> None:
        """Damage one of the stored files, if that is possible."""

    def repair(self) -> None:
        """Put all damaged files back."""

    def merge(self, disk: str, *, keep: bool) -> None:
        """Merge the newest chain of a disk, where there are chains, with or without its states."""

    @property
    def _which(self) -> tuple[str, ...]:
        """Options that say whose points are meant, where there may be those of other VMs."""
        return ()

    @abstractmethod
    def _visited(self, result: Result, files: object) -> None:
        """Look at a backup of a VM of the same name on another host; `files` were there before."""

    def manifests(self) -> list[dict[str, Any]]:
        """The manifests of all points, in the order in which they were made."""
        return manifests(self.target)

    def run(self, *arguments: cli.Argument, program: str = "qmpbackup") -> Result:
        """Run a command that uses the target."""
        return cli.run(*arguments, program=program, env=environment_of(self.target))

    def _ids(self) -> set[str]:
        return {point["id"] for point in self.manifests()}

    def visit(self, byte: int) -> None:
        """A VM of the same name on another host has the same target."""
        files = self._files()
        image = self._folder / "visitor.img"
        create(image, SIZE, contents=bytes([byte]) * SIZE)
        with Qemu([Disk("vda", image)], name="world") as vm:
            arguments = ("backup", "--level", "auto", "--host", ELSEWHERE)
            result = self.run("--socket", vm.socket, *arguments, "--target", str(self.target))
            self._visited(result, files)

    # Backups

    def back_up(self, level: str, meddling: Meddling | None = None) -> None:
        """Run a backup; the model follows."""
        self.vm.flush()
        ids, files, marks = self._ids(), self._files(), self._bitmaps()
        states: list[Pictures] = [self._pictures()]
        result = self._run(level, meddling)
        self._put_right()
        states.append(self._pictures())
        made = [each for each in self._ids() if each not in ids]
        if meddling and meddling.what == "kill QEMU" and not self.vm.running:
            self._start()
            self._trust.update({disk: Trust() for disk in self.disks})
        if result.code == NO_INCREMENTAL:
            if self._tidy:
                assert (self._files(), self._bitmaps()) == (files, marks), "not left as it was"
            self._refused(level, result)
            return
        assert result.code in _CODES[meddling.what if meddling else None], str(result)
        possible = {DONE: {1}, DEGRADED: {1}, KILLED: {0, 1}}.get(result.code, {0})
        assert len(made) in possible, str(result)
        for point in made:
            self._made(point, level, states)
        self._tidy = result.code == DONE
        if self._tidy:
            self.assert_tidy()

    def _run(self, level: str, meddling: Meddling | None) -> Result:
        path = self.vm.folder / "proxy" if meddling else self.vm.socket
        arguments = ("backup", "--level", level, "--target", str(self.target))
        if meddling is None:
            return self.run("--socket", path, *arguments)
        with Proxy(path, self.vm.socket, lambda proxy, at: self._meddle(proxy, at, meddling)):
            result = self.run("--socket", path, *arguments)
            if self.vm.running:  # somebody else sees to that, through the proxy
                self.vm.qmp.poll(lambda: self.vm.qmp("query-status")["running"])
        return result

    def _meddle(self, proxy: Proxy, at: Place, meddling: Meddling) -> None:
        number = meddling.number
        if meddling.what == "unmount the target":
            # Before the run knows the target, it is just a folder without points.
            known = proxy.log.index("stop") if "stop" in proxy.log else at.number + 1
            number = max(number, known)
        if proxy.killed or (at.number, at.when) != (number, meddling.when):
            return
        if meddling.what == "kill the tool":
            proxy.kill_client()
        elif meddling.what == "cut the connection":
            proxy.cut()
        elif meddling.what == "kill QEMU":
            self.vm.kill()
        elif meddling.what == "write":
            self.write("vda", 7 * meddling.number, 2, meddling.number % 255 + 1)
        elif meddling.what == "grow":
            self._grow_meanwhile()
        elif meddling.what == "fill the target":
            self.storage.fill()
        elif meddling.what == "fill the images":
            self.images.fill()
            self.overwrite("vdb", meddling.number % 255 + 1)
        else:
            self.storage.take_away()

    def _put_right(self) -> None:
        """There is room again, and what was unmounted is mounted."""
        self.storage.clear()
        self.storage.bring_back()
        self.images.clear()

    def _grow_meanwhile(self) -> None:
        size = len(self.live["vda"]) + CLUSTER
        with suppress(QmpError):  # as it is not possible at any time
            self.resize("vda", size)

    def _refused(self, level: str, result: Result) -> None:
        """Where an incremental is refused, that is right, and `auto` makes a full of that disk."""
        assert level in {"inc", "diff"}, str(result)
        named = [disk for disk in self.disks if f"Disk {disk} " in result.err]
        assert named, str(result)
        assert not getattr(self._trust[named[0]], level), str(result)
        if level == "inc":
            self.back_up("auto")
            point = self.manifests()[-1]
            found = {disk["id"]: disk["level"] for disk in point["disks"]}
            assert found[named[0]] == "full", (str(result), found)

    def _made(self, point: str, level: str, states: list[Pictures]) -> None:
        """A point appeared: it holds one of the states that there were."""
        found = next(each for each in self.manifests() if each["id"] == point)
        made = {disk["id"]: disk["level"] for disk in found["disks"]}
        assert set(made) == set(self.disks)
        self._had[point] = set(self.disks)
        self.points[point] = states[0]
        if states[0] != states[1]:
            self.points[point] = self._whichever(point, states)
        for disk, each in made.items():
            trust = self._trust[disk]
            assert level in {each, "auto"}, (level, each)
            assert each == "inc" or level != "auto" or not trust.inc, f"an inc of {disk} was due"
            assert disk != SHARED or each in {"full", "copy"}, f"an {each} of a shared disk"
            if each != "copy" and disk != SHARED:
                self._trust[disk] = Trust(inc=True, diff=trust.diff or each == "full")

    def _whichever(self, point: str, states: list[Pictures]) -> Pictures:
        result, found = self._restore(point)
        if result.code == DAMAGED:
            return states[0]  # cannot be told, and need not, as long as that is so
        for state in states:
            if {disk: each.contents for disk, each in state.items()} == found:
                return state
        raise AssertionError(f"{point} is neither the state before nor after:\n{result}")

    def _pictures(self) -> Pictures:
        return {disk: self._album.keep(bytes(each)) for disk, each in self.live.items()}

    # Restores

    def restore(self, point: str) -> None:
        """Restore a point: the right bytes, or damage named."""
        result, found = self._restore(point)
        bad = [path for path in self.damaged if path in self._needed(point)]
        if result.code == DAMAGED:
            assert bad, str(result)
            assert any(path.name in result.err for path in bad), str(result)
            return
        expected = self.points[point]
        result.check(DONE if set(expected) == self._had[point] else DEGRADED)
        assert set(found) == set(expected), point
        for disk, picture in expected.items():
            assert not first_difference(found[disk], picture.contents), f"{disk} of {point}"

    def _restore(self, point: str) -> tuple[Result, dict[str, bytes]]:
        output = self._folder / "restored"
        where = ("--point", point, "--output", output, "--format", "raw")
        result = self.run("restore", "--target", str(self.target), *self._which, *where)
        images = list(output.iterdir()) if output.exists() else []
        assert result.code in {DONE, DEGRADED} or not images, f"left behind: {images}"
        found = {image.name.removesuffix(".raw"): image.read_bytes() for image in images}
        shutil.rmtree(output, ignore_errors=True)
        return result, found

    def verify(self) -> None:
        """`verify` names what is damaged, and just that."""
        result = self.run("verify", "--target", str(self.target), *self._which)
        needed = {path for point in self.points for path in self._needed(point)}
        bad = [path for path in self.damaged if path in needed]
        result.check(DAMAGED if bad else DONE)
        for path in bad:
            assert path.name in result.out, str(result)

    def _stored(self, points: Iterable[Any]) -> dict[tuple[str, str], Any]:
        return {(point["id"], disk["id"]): disk for point in points for disk in point["disks"]}

    # What happens to the points

    def prune(self, last: int) -> None:
        """Keep so many of the newest points, and what cannot go; damage may end it in between."""
        before = self.manifests()
        wanted = {point["id"] for point in before[-last:]}
        result = self.run(
            "prune", "--target", str(self.target), *self._which, "--keep-last", last, "--json"
        )
        result.check(DAMAGED if result.code == DAMAGED and self.damaged else DONE)
        after = {point["id"]: point for point in self.manifests()}
        assert wanted <= set(after), str(result)
        if result.code == DONE:
            kept = {each["id"] for each in result.objects if each.get("keep")}
            assert set(after) == kept, str(result)
        for point in [each for each in self.points if each not in wanted]:
            held = {each["id"] for each in after[point]["disks"]} if point in after else set()
            lost = self.points[point].keys() - held
            assert not lost or result.code == DAMAGED or not held, str(result)
            for disk in lost:
                self._forget(disk, [point])
        if self._stored(before) != self._stored(after.values()):
            for trust in self._trust.values():
                trust.diff = False  # the full that the next one would be from may have been merged
        needed = {path for point in self.points for path in self._needed(point)}
        self.damaged = {path: data for path, data in self.damaged.items() if path in needed}

    def _forget(self, disk: str, points: Iterable[str]) -> None:
        for point in points:
            left = {each: picture for each, picture in self.points[point].items() if each != disk}
            self.points[point] = left
            if not left:
                del self.points[point]

    # What must be so at any time

    def check(self) -> None:
        """The VM runs, its disks hold what the guest wrote, and the target the points it should."""
        assert self.vm.qmp("query-status")["running"], "the VM does not run"
        assert self._ids() == set(self.points)
        stored = self._stored(self.manifests())
        expected = {(point, disk) for point, each in self.points.items() for disk in each}
        assert set(stored) == expected
        for disk, contents in self.live.items():
            assert not first_difference(self.vm.contents(disk), bytes(contents)), f"the live {disk}"

    def assert_tidy(self) -> None:
        """Nothing is left of any run but what the next one needs."""
        assert leftovers(self.vm) == []
        assert not list(self.images.path.glob(".qmpbackup-*")), "a scratch image is left"
        points = self.manifests()
        self._assert_only_named(points)
        for disk in self.disks:
            self._assert_bitmaps(disk, points)

    def _assert_bitmaps(self, disk: str, points: list[dict[str, Any]]) -> None:
        stored = [each for point in points for each in point["disks"] if each["id"] == disk]
        needed = {each.get(key, "") for each in stored for key in ("bitmap", "end_mark")}
        found = {name for owner, name in self._bitmaps() if owner == disk}
        assert found <= needed, f"bitmaps of no point on {disk}: {found - needed}"
        assert len(found) <= 4, f"superfluous bitmaps on {disk}: {found}"

    def _bitmaps(self) -> set[tuple[str, str]]:
        """Our bitmaps on the active nodes of the disks."""
        active = {self._active(disk): disk for disk in self.disks}
        return {
            (active[node["node-name"]], bitmap["name"])
            for node in self.vm.qmp("query-named-block-nodes", flat=True)
            for bitmap in node.get("dirty-bitmaps", [])
            if node["node-name"] in active and bitmap.get("name", "").startswith(PREFIX)
        }
