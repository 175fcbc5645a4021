# SPDX-License-Identifier: Apache-2.0
"""A VM with its target, whatever befalls them, and a model that knows what every point must hold.

`World` does what users, guests, administrators and accidents do; each of its methods leaves the VM idle
and asserts what must be so. The model holds the bytes of all disks now, the bytes of each point, and for
each disk whether the product may still refuse to build on what it has.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from lab import cli
from lab.aftermath import PREFIX, manifests
from lab.backups import leftovers
from lab.cli import Result
from lab.disks import CLUSTER, MIB, Disk, create, first_difference, pattern
from lab.proxy import Place, Proxy, When
from lab.qemu import Qemu
from lab.qmp import QmpError

SIZE = 10 * MIB
MARK = ".damaged"
"""What notes in the target end with that say which files are known to be damaged."""
OWN_FILES = {"vm.json", ".lock", ".lock-remove"}
DONE, DEGRADED, USAGE, NO_INCREMENTAL, VM, DAMAGED, KILLED = 0, 3, 2, 4, 6, 8, -9

Accident = Literal["kill the tool", "kill QEMU", "cut the connection", "write", "grow"]
Damage = Literal["flip", "truncate", "remove"]

_CODES: dict[Accident | None, set[int]] = {
    None: {DONE},
    "write": {DONE},
    "grow": {DONE, VM},
    "kill the tool": {DONE, KILLED},
    "kill QEMU": {DONE, DEGRADED, VM},
    "cut the connection": {DONE, DEGRADED, VM},
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


@dataclass
class Trust:
    """Whether an incremental, or a differential, of a disk must be possible. (Where it need not be, it
    may all the same.)"""

    inc: bool = False
    diff: bool = False


class World:
    """See the module. A context manager; `folder` is empty and takes everything."""

    def __init__(self, folder: Path) -> None:
        self.target = folder / "target"
        self.points: dict[str, Pictures] = {}
        self.damaged: dict[Path, bytes] = {}
        self._folder = folder
        self._album = Album()
        self._trust: dict[str, Trust] = {}
        self._bottoms: dict[str, Disk] = {}
        self._shelf: dict[str, Disk] = {}
        self._copies: dict[str, Path] = {}
        self._overlays = 0
        self._tidy = True
        self.disks: dict[str, Disk] = {}
        self.live: dict[str, bytearray] = {}
        self._bring("vda", "qcow2")
        self._bring("vdb", "raw")
        self.vm = self._qemu()

    def __enter__(self) -> Self:
        self.vm.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.vm.__exit__(kind, error, trace)

    def _bring(self, name: str, image_format: str) -> None:
        contents = bytearray(SIZE)
        contents[: 32 * CLUSTER] = pattern(32 * CLUSTER, sum(name.encode()))
        image = create(self._folder / f"{name}.img", SIZE, image_format, contents=bytes(contents))
        bus: Literal["virtio-scsi", "virtio-blk"] = "virtio-scsi" if name == "vdc" else "virtio-blk"
        self.disks[name] = Disk(name, image, image_format, bus)
        self.live[name] = contents
        self._trust[name] = Trust()

    def _qemu(self) -> Qemu:
        hub = ("-device", "virtio-scsi-pci,id=hub")
        return Qemu(list(self.disks.values()), name="world", args=hub)

    # What the guest does

    def write(self, disk: str, block: int, blocks: int, byte: int) -> None:
        """Write something, not on the edges of clusters."""
        start, length = self._area(disk, block, blocks)
        self.vm.write(disk, start, length, byte)
        self.live[disk][start : start + length] = bytes([byte]) * length

    def clear(self, disk: str, block: int, blocks: int, *, unmap: bool) -> None:
        """Write zeroes, or unmap them, too."""
        start, length = self._area(disk, block, blocks)
        self.vm.qemu_io(disk, f"write -z {'-u ' if unmap else ''}{start} {length}")
        self.live[disk][start : start + length] = bytes(length)

    def discard(self, disk: str, block: int, blocks: int) -> None:
        """Discard an area, which then holds whatever QEMU likes."""
        start, length = self._area(disk, block, blocks)
        self.vm.qemu_io(disk, f"discard {start} {length}")
        self.live[disk][start : start + length] = self.vm.contents(disk)[start : start + length]

    def _area(self, disk: str, block: int, blocks: int) -> tuple[int, int]:
        size = len(self.live[disk])
        start = block * CLUSTER % size
        length = min(blocks * CLUSTER, size - start)
        return (start, length) if length <= 1024 else (start + 512, length - 1024)

    # What an administrator does

    def resize(self, disk: str, *sizes: int) -> None:
        """Give a disk one size after the other."""
        for size in sizes:
            self._resize(self.vm, disk, size)
            before = self.live[disk]
            if size < len(before):
                self._trust[disk] = Trust()
            before[size:] = bytes(max(0, size - len(before)))

    def _resize(self, vm: Qemu, disk: str, size: int) -> None:
        vm.qmp("block_resize", node_name=self._active(disk), size=size)

    def _active(self, disk: str) -> str:
        path = self.vm.qdev(disk)
        (device,) = (each for each in self.vm.qmp("query-block") if each.get("qdev") == path)
        return str(device["inserted"]["node-name"])

    def snapshot(self, disk: str) -> None:
        """Put an overlay on top of a disk."""
        self.recover()
        self._overlays += 1
        name = f"over{self._overlays}-{disk}"
        overlay = self._folder / name
        self.vm.qmp(
            "blockdev-snapshot-sync",
            node_name=self._active(disk),
            snapshot_file=str(overlay),
            snapshot_node_name=name,
        )
        self._bottoms.setdefault(disk, self.disks[disk])
        self.disks[disk] = replace(self.disks[disk], image=overlay, format="qcow2")
        self._trust[disk] = Trust()

    @property
    def overlaid(self) -> list[str]:
        """Disks that have overlays."""
        return [each for each in self.disks if each in self._bottoms]

    def commit(self, disk: str) -> None:
        """Merge the overlays of a disk into its lowest image, and go on with that."""
        self.recover()
        top = self._active(disk)
        self.vm.qmp("block-commit", device=top, job_id="commit")
        self.vm.qmp.poll(lambda: self._job("commit") == "ready")
        self.vm.qmp("job-complete", id="commit")
        self.vm.qmp.poll(lambda: self._job("commit") == "")
        with suppress(QmpError):  # only one that was on the command line stays
            self.vm.qmp("blockdev-del", node_name=top)
        self.disks[disk] = self._bottoms.pop(disk)
        self._trust[disk] = Trust()
        # A lower image that is larger keeps its size, and what it has at its end.
        found, before = self.vm.contents(disk), bytes(self.live[disk])
        assert not first_difference(found[: len(before)], before)
        self.live[disk] = bytearray(found)

    def _job(self, name: str) -> str:
        jobs = {job["id"]: str(job["status"]) for job in self.vm.qmp("query-jobs")}
        return jobs.get(name, "")

    def plug(self) -> None:
        """Add the disk vdc: the one that was removed, or a new one."""
        if "vdc" in self._shelf:
            disk = self.disks["vdc"] = self._shelf.pop("vdc")
        else:
            self._bring("vdc", "qcow2")
            disk = self.disks["vdc"]
        file = {"driver": "file", "filename": str(disk.image)}
        self.vm.qmp("blockdev-add", driver="qcow2", node_name=disk.node, discard="unmap", file=file)
        self.vm.qmp("device_add", driver="scsi-hd", id="vdc", drive=disk.node, bus="hub.0")
        self.vm.disks.append(disk)
        self.live["vdc"] = bytearray(self.vm.contents("vdc"))

    def unplug(self) -> None:
        """Remove the disk vdc."""
        self.recover()
        node = self._active("vdc")
        self.vm.qmp("device_del", id="vdc")
        self.vm.qmp.poll(
            lambda: all(b["device"] or "vdc" not in b.get("qdev", "") for b in self._blocks())
        )
        self.vm.qmp.poll(lambda: self._closed(node))
        self.vm.disks = [each for each in self.vm.disks if each.id != "vdc"]
        self._shelf["vdc"] = self.disks.pop("vdc")
        del self.live["vdc"]

    def _blocks(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.vm.qmp("query-block")
        return found

    def _closed(self, node: str) -> bool:
        with suppress(QmpError):
            self.vm.qmp("blockdev-del", node_name=node)
            return True
        return False

    def recover(self) -> None:
        """Clear up after a run that died, as one does before one changes what it left in place."""
        if leftovers(self.vm):
            cli.run("--socket", self.vm.socket, "recover").check()
            left = leftovers(self.vm)
            assert not left, f"recovery left {left}"

    def restart(self, source: Path | None = None, destination: Path | None = None) -> None:
        """End QEMU in order and start it again; in between, perhaps, copy a file."""
        self.vm.quit()
        if source and destination:
            shutil.copy(source, destination)
        self._start()
        for disk in self.disks.values():
            if disk.format == "raw":
                self._trust[disk.id] = Trust()

    def kill(self) -> None:
        """Kill QEMU and start it again."""
        self.vm.flush()
        self.vm.kill()
        self._start()
        self._trust.update({disk: Trust() for disk in self.disks})

    def _start(self) -> None:
        self.vm.__exit__(None, None, None)
        self.vm = self._qemu()
        self.vm.__enter__()

    def copy_image(self, disk: str) -> None:
        """Stop the VM and keep a copy of an image."""
        self._copies[disk] = self._folder / f"{disk}.copy"
        self.restart(self.disks[disk].image, self._copies[disk])

    @property
    def copied(self) -> list[str]:
        """Disks of which an older copy can be put back."""
        return [each for each in self._copies if each in self.disks and each not in self._bottoms]

    def put_back(self, disk: str) -> None:
        """Stop the VM and put the kept copy in the place of an image."""
        self.restart(self._copies[disk], self.disks[disk].image)
        self._trust[disk] = Trust()
        self.live[disk] = bytearray(self.vm.contents(disk))

    # Backups

    def back_up(self, level: str, meddling: Meddling | None = None) -> None:
        """Run a backup; the model follows."""
        self.vm.flush()
        ids, files, marks = set(self._ids()), self._files(), self._bitmaps()
        states: list[Pictures] = [self._pictures()]
        result = self._run(level, meddling)
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
        arguments = ("backup", "--level", level, "--target", self.target)
        if meddling is None:
            return cli.run("--socket", path, *arguments)
        with Proxy(path, self.vm.socket, lambda proxy, at: self._meddle(proxy, at, meddling)):
            result = cli.run("--socket", path, *arguments)
            if self.vm.running:  # somebody else sees to that, through the proxy
                self.vm.qmp.poll(lambda: self.vm.qmp("query-status")["running"])
        return result

    def _meddle(self, proxy: Proxy, at: Place, meddling: Meddling) -> None:
        if proxy.killed or (at.number, at.when) != (meddling.number, meddling.when):
            return
        if meddling.what == "kill the tool":
            proxy.kill_client()
        elif meddling.what == "cut the connection":
            proxy.cut()
        elif meddling.what == "kill QEMU":
            self.vm.kill()
        elif meddling.what == "write":
            self.write("vda", 7 * meddling.number, 2, meddling.number % 255 + 1)
        else:
            self._grow_meanwhile()

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
            point = manifests(self.target)[-1]
            found = {disk["id"]: disk["level"] for disk in point["disks"]}
            assert found[named[0]] == "full", (str(result), found)

    def _made(self, point: str, level: str, states: list[Pictures]) -> None:
        """A point appeared: it holds one of the states that there were."""
        found = next(each for each in manifests(self.target) if each["id"] == point)
        made = {disk["id"]: disk["level"] for disk in found["disks"]}
        assert set(made) == set(self.disks)
        self.points[point] = states[0]
        if states[0] != states[1]:
            self.points[point] = self._whichever(point, states)
        for disk, each in made.items():
            trust = self._trust[disk]
            assert level in {each, "auto"}, (level, each)
            assert each == "inc" or level != "auto" or not trust.inc, f"an inc of {disk} was due"
            if each != "copy":
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
        result.check()
        expected = self.points[point]
        assert set(found) == set(expected), point
        for disk, picture in expected.items():
            assert not first_difference(found[disk], picture.contents), f"{disk} of {point}"

    def _restore(self, point: str) -> tuple[Result, dict[str, bytes]]:
        output = self._folder / "restored"
        where = ("--point", point, "--output", output, "--format", "raw")
        result = cli.run("restore", "--target", self.target, *where)
        images = list(output.iterdir()) if output.exists() else []
        assert result.code == DONE or not images, f"left behind: {images}"
        found = {image.name.removesuffix(".raw"): image.read_bytes() for image in images}
        shutil.rmtree(output, ignore_errors=True)
        return result, found

    def verify(self) -> None:
        """`verify` names what is damaged, and just that."""
        result = cli.run("verify", "--target", self.target)
        needed = {path for point in self.points for path in self._needed(point)}
        bad = [path for path in self.damaged if path in needed]
        result.check(DAMAGED if bad else DONE)
        for path in bad:
            assert path.name in result.out, str(result)

    @property
    def marks(self) -> list[str]:
        """What the target says to be damaged."""
        return sorted(path.name for path in self._paths() if path.name.endswith(MARK))

    def _needed(self, point: str) -> set[Path]:
        """The files that a point is made of."""
        disks = self._stored(manifests(self.target))
        found = set()
        for each in [disk for known, disk in disks if known == point]:
            found |= {self.target / file for _, file in self._chain(disks, point, each)}
        return found

    def _stored(self, points: Iterable[Any]) -> dict[tuple[str, str], Any]:
        return {(point["id"], disk["id"]): disk for point in points for disk in point["disks"]}

    def _chain(
        self, disks: Mapping[tuple[str, str], Any], point: str, disk: str
    ) -> list[tuple[str, str]]:
        """Points and files that a disk of a point builds on, and its own first."""
        links = []
        at: str | None = point
        while at is not None:
            stored = disks[at, disk]
            links.append((at, str(stored["file"])))
            at = stored["parent"]
        return links

    # What happens to the target

    def damage(self, file: int, how: Damage, at: int) -> None:
        """Damage one of the stored files."""
        files = sorted(path for path in self._stored_files() if path not in self.damaged)
        if not files:
            return
        path = files[file % len(files)]
        data = path.read_bytes()
        self.damaged[path] = data
        self._trust[path.parent.name] = Trust()
        if how == "remove":
            path.unlink()
        elif how == "truncate":
            path.write_bytes(data[: at % len(data)])
        else:
            at %= len(data)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])

    def _stored_files(self) -> set[Path]:
        return {
            self.target / disk["file"]
            for point in manifests(self.target)
            for disk in point["disks"]
        }

    def repair(self) -> None:
        """Put all damaged files back."""
        for path, data in self.damaged.items():
            path.write_bytes(data)
        self.damaged.clear()

    def merge(self, disk: str, *, keep: bool) -> None:
        """Merge the newest chain of a disk, with or without its states."""
        disks = self._stored(manifests(self.target))
        chains = [
            known for known, each in disks.items() if known[1] == disk and not each.get("snapshot")
        ]
        chained = [known for known in chains if disks[known]["level"] != "copy"]
        if not chained:
            return
        chain = self._chain(disks, chained[-1][0], disk)
        files = self._files()
        program, verb = ("qmprestore", "snapshotrebase") if keep else ("qmprebase", "rebase")
        result = cli.run(verb, "--dir", self.target / disk, program=program)
        bad = [file for _, file in chain if self.target / file in self.damaged]
        if result.code != DONE:
            assert result.code in ({USAGE, DAMAGED} if bad else {USAGE}), str(result)
            assert result.code != USAGE or self._branches(disks, disk, chain), str(result)
            assert not self._tidy or self._files() == files, (
                f"a refusal changed something: {result}"
            )
            return
        assert not bad or len(chain) == 1, str(result)
        if not keep:
            self._forget(disk, [point for point, _ in chain[1:]])
        self._trust[disk].diff = self._trust[disk].inc

    def prune(self, last: int) -> None:
        """Keep so many of the newest points, and what cannot go; damage may end it in between."""
        before = manifests(self.target)
        wanted = {point["id"] for point in before[-last:]}
        result = cli.run("prune", "--target", self.target, "--keep-last", last, "--json")
        result.check(DAMAGED if result.code == DAMAGED and self.damaged else DONE)
        after = {point["id"]: point for point in manifests(self.target)}
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
        named = self._stored_files()
        self.damaged = {path: data for path, data in self.damaged.items() if path in named}

    def _branches(
        self, disks: Mapping[tuple[str, str], Any], disk: str, chain: list[tuple[str, str]]
    ) -> bool:
        """Whether anything builds on files in the middle of a chain."""
        inside = {point for point, _ in chain}
        return any(
            each["parent"] in inside and point not in inside
            for (point, owner), each in disks.items()
            if owner == disk
        )

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
        assert set(self._ids()) == set(self.points)
        stored = self._stored(manifests(self.target))
        expected = {(point, disk) for point, each in self.points.items() for disk in each}
        assert set(stored) == expected
        for disk, contents in self.live.items():
            assert not first_difference(self.vm.contents(disk), bytes(contents)), f"the live {disk}"

    def assert_tidy(self) -> None:
        """Nothing is left of any run but what the next one needs."""
        assert leftovers(self.vm) == []
        assert not list(self._folder.glob(".qmpbackup-*")), "a scratch image is left"
        points = manifests(self.target)
        named = {disk["file"] for point in points for disk in point["disks"]}
        named |= {f"points/{point['id']}.json" for point in points}
        found = {str(path.relative_to(self.target)) for path in self._paths()} - OWN_FILES
        found = {each for each in found if not each.endswith(MARK)}
        assert found <= named, f"left in the target: {found - named}"
        assert {self.target / each for each in named - found} <= set(self.damaged), named - found
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

    def _paths(self) -> list[Path]:
        return [path for path in self.target.rglob("*") if path.is_file()]

    def _files(self) -> dict[Path, tuple[int, int]]:
        """The state of everything in the target but locks."""
        found = {path: path.stat() for path in self._paths() if not path.name.startswith(".lock")}
        return {path: (each.st_mtime_ns, each.st_size) for path, each in found.items()}

    def _ids(self) -> list[str]:
        return [json.loads(path.read_text())["id"] for path in self.target.glob("points/*.json")]
