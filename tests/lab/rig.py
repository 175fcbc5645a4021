# SPDX-License-Identifier: Apache-2.0
"""A VM whose disks are known byte for byte, whatever guests and administrators do to it.

`Rig` leaves the VM idle after each of its methods, and keeps for each disk whether a backup may still
refuse to build on what it has.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab import cli
from lab.backups import leftovers
from lab.disks import CLUSTER, MIB, Bus, Disk, contents, create, first_difference, pattern, qemu_img
from lab.qemu import Qemu
from lab.qmp import QmpError
from lab.small import FileSystem

SIZE = 10 * MIB
SHARED = "vdd"
"""A disk that others may write to, which no bitmap sees."""


@dataclass
class Trust:
    """Whether an incremental, or a differential, of a disk must be possible. (Where it need not be, it
    may all the same.)"""

    inc: bool = False
    diff: bool = False


class Rig:
    """See the module. A context manager; `folder` is empty and takes everything."""

    def __init__(self, folder: Path) -> None:
        self.images = FileSystem(folder / "images")
        self.disks: dict[str, Disk] = {}
        self.live: dict[str, bytearray] = {}
        self._folder = folder
        self._trust: dict[str, Trust] = {}
        self._bottoms: dict[str, Disk] = {}
        self._shelf: dict[str, Disk] = {}
        self._copies: dict[str, Path] = {}
        self._numbers = count(1)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self._begin()
            self._stack = self._stack.pop_all()
        return self

    def _begin(self) -> None:
        self._stack.enter_context(self.images)
        self._bring("vda", "qcow2")
        self._bring("vdb", "raw")
        self.vm = self._qemu()
        self.vm.__enter__()
        self._stack.push(self._end)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _end(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.vm.__exit__(kind, error, trace)  # whichever it is by then

    def _bring(self, name: str, image_format: str) -> None:
        contents = bytearray(SIZE)
        contents[: 32 * CLUSTER] = pattern(32 * CLUSTER, sum(name.encode()))
        image = create(
            self.images.path / f"{name}.img", SIZE, image_format, contents=bytes(contents)
        )
        if name == SHARED:
            file = {"driver": "file", "filename": str(image), "locking": "off"}
            share = ("share-rw=on",)
            disk = Disk(name, image, "raw", "virtio-scsi", device=share, options={"file": file})
        else:
            bus: Bus = "virtio-scsi" if name == "vdc" else "virtio-blk"
            disk = Disk(name, image, image_format, bus)
        self.disks[name] = disk
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

    def overwrite(self, disk: str, byte: int) -> None:
        """Write where the image needs no room for it, if there is such a place."""
        live = self.live[disk]
        used = [at for at in range(0, SIZE, CLUSTER) if any(live[at : at + CLUSTER])]
        if used and disk not in self._bottoms:
            at = used[byte % len(used)]
            self.vm.write(disk, at, CLUSTER, byte)
            live[at : at + CLUSTER] = bytes([byte]) * CLUSTER

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
        name = f"over{next(self._numbers)}-{disk}"
        overlay = self.images.path / name
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
        for node in {top, self.disks[disk].node} - {self._active(disk)}:
            with suppress(QmpError):  # only one that was on the command line has stayed
                self.vm.qmp("blockdev-del", node_name=node)
        self.disks[disk] = self._bottoms.pop(disk)
        self._trust[disk] = Trust()
        # A lower image that is larger keeps its size, and what it has at its end.
        found, before = self.vm.contents(disk), bytes(self.live[disk])
        assert not first_difference(found[: len(before)], before)
        self.live[disk] = bytearray(found)

    def _job(self, name: str) -> str:
        jobs = {job["id"]: str(job["status"]) for job in self.vm.qmp("query-jobs")}
        return jobs.get(name, "")

    def exchange_base(self, disk: str, byte: int) -> None:
        """While the VM is off, put another base below the overlays of a disk."""
        overlay, base = (
            self.disks[disk].image,
            self.images.path / f"base{next(self._numbers)}-{disk}",
        )

        def exchange() -> None:
            old = json.loads(qemu_img("info", "--output", "json", str(overlay)))
            data = bytearray(
                contents(Path(old["full-backing-filename"]), old["backing-filename-format"])
            )
            data[: 4 * CLUSTER] = bytes([byte]) * (4 * CLUSTER)
            create(base, len(data), contents=bytes(data))
            qemu_img("rebase", "-u", "-b", str(base), "-F", "qcow2", str(overlay))

        self.restart(exchange)
        self._bottoms[disk] = replace(self._bottoms[disk], image=base, format="qcow2")
        self._copies.pop(disk, None)
        self._trust[disk] = Trust()
        self.live[disk] = bytearray(self.vm.contents(disk))

    def plug(self, name: str) -> None:
        """Add the disk vdc or the shared one: the one that was removed, or a new one."""
        if name in self._shelf:
            self.disks[name] = self._shelf.pop(name)
        else:
            self._bring(name, "raw" if name == SHARED else "qcow2")
        disk = self.disks[name]
        file = disk.options.get("file", {"driver": "file", "filename": str(disk.image)})
        self.vm.qmp(
            "blockdev-add", driver=disk.format, node_name=disk.node, discard="unmap", file=file
        )
        share = {"share_rw": True} if name == SHARED else {}
        self.vm.qmp("device_add", driver="scsi-hd", id=name, drive=disk.node, bus="hub.0", **share)
        self.vm.disks.append(disk)
        self.live[name] = bytearray(self.vm.contents(name))

    def unplug(self, name: str) -> None:
        """Remove one of these disks."""
        self.recover()
        node = self._active(name)
        self.vm.qmp("device_del", id=name)
        self.vm.qmp.poll(
            lambda: all(b["device"] or name not in b.get("qdev", "") for b in self._blocks())
        )
        self.vm.qmp.poll(lambda: self._closed(node))
        self.vm.disks = [each for each in self.vm.disks if each.id != name]
        self._shelf[name] = self.disks.pop(name)
        del self.live[name]

    def write_from_elsewhere(self, block: int, blocks: int, byte: int) -> None:
        """Write to the shared disk as another VM that has it, too."""
        start, length = self._area(SHARED, block, blocks)
        with self.disks[SHARED].image.open("r+b") as image:
            image.seek(start)
            image.write(bytes([byte]) * length)
        self.live[SHARED][start : start + length] = bytes([byte]) * length

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

    def restart(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """End QEMU in order and start it again; in between, perhaps, do something."""
        self.vm.quit()
        meanwhile()
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
        self.restart(lambda: shutil.copy(self.disks[disk].image, self._copies[disk]))

    @property
    def copied(self) -> list[str]:
        """Disks of which an older copy can be put back."""
        return [each for each in self._copies if each in self.disks and each not in self._bottoms]

    def put_back(self, disk: str) -> None:
        """Stop the VM and put the kept copy in the place of an image."""
        self.restart(lambda: shutil.copy(self._copies[disk], self.disks[disk].image))
        self._trust[disk] = Trust()
        self.live[disk] = bytearray(self.vm.contents(disk))
