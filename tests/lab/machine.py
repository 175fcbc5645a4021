# SPDX-License-Identifier: Apache-2.0
"""What a test does inside a VM, however that was started: its monitor, I/O where the guest does it,
and what is on its disks."""

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lab import disks as images
from lab.disks import Disk
from lab.qmp import Monitor

LINE_BUFFERED = {
    "LD_PRELOAD": "/usr/libexec/coreutils/libstdbuf.so",
    "_STDBUF_O": "L",
}
"""The environment of QEMU: `qemu-io` in the monitor prints to standard output; without this only at
exit."""

_FAILED = re.compile(r"fail|error|invalid|unknown|cannot|not found|no such|usage", re.IGNORECASE)
_FILTERS = ("throttle", "copy-on-read", "copy-before-write", "snapshot-access", "blkdebug")


class Machine(ABC):
    """A running QEMU. `socket` is the monitor for the product."""

    disks: list[Disk]
    socket: Path

    @property
    @abstractmethod
    def qmp(self) -> Monitor:
        """The test's own monitor."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """QEMU's process id."""

    @property
    @abstractmethod
    def printed(self) -> Path:
        """The file that holds QEMU's standard output."""

    def qdev(self, disk: str) -> str:
        """The device path of the disk with this device id or drive name, for `qemu-io -d`."""
        for device in self.qmp("query-block"):
            path = str(device.get("qdev", ""))
            if disk in (path, device["device"]) or disk in path.split("/"):
                return path
        raise AssertionError(f"the VM has no disk {disk}")

    def hmp(self, line: str) -> str:
        """Carry out a line of the human monitor and return what it printed."""
        return self.qmp.hmp(line)

    def qemu_io(self, disk: str, command: str) -> str:
        """Do I/O where the guest does: `vm.qemu_io("vda", "write -P 1 0 64k")`.

        Raises:
            AssertionError: it failed.
        """
        return self.qemu_io_at(self.qdev(disk), command)

    def qemu_io_at(self, qdev: str, command: str) -> str:
        """The same where the device path is known already."""
        printed = self.printed.stat().st_size
        output = self.hmp(f'qemu-io -d {qdev} "{command}"')
        with self.printed.open() as file:
            file.seek(printed)
            output += file.read()
        assert not _FAILED.search(output), f"qemu-io {qdev} {command}: {output}"
        assert output or command == "flush", f"qemu-io {qdev} {command} printed nothing"
        return output

    def write(self, disk: str, offset: int, length: int, byte: int) -> None:
        """Write `length` times `byte` at `offset`."""
        self.qemu_io(disk, f"write -P {byte} {offset} {length}")

    def flush(self, disk: str | None = None) -> None:
        """Flush one disk or all, so that `kill` does not lose what was written."""
        for each in [disk] if disk else [disk.id for disk in self.disks]:
            self.qemu_io(each, "flush")

    def contents(self, disk: str) -> bytes:
        """The live contents of a disk, read by `qemu-img` past the product and its nodes.

        Only right while nothing writes.
        """
        self.flush(disk)
        image, image_format = self.image(disk)
        return images.contents(image, image_format)

    def live(self) -> dict[str, bytes]:
        """The live contents of all disks."""
        return {each.id: self.contents(each.id) for each in self.disks}

    def image(self, disk: str) -> tuple[Path, str]:
        """The active image of a disk, below all filters, and its format."""
        path = self.qdev(disk)
        (device,) = (each for each in self.qmp("query-block") if each.get("qdev") == path)
        name = device["inserted"]["image"]["filename"]
        if not name.startswith("json:"):
            # A filter reports the name of what is below it, but its own driver.
            names = {"raw", "qcow2"} & {str(device["inserted"]["drv"])}
            return Path(name), names.pop() if names else self._format(Path(name))
        node: dict[str, Any] = json.loads(name.removeprefix("json:"))
        while node["driver"] in _FILTERS:
            node = node["file"]
        image_format = node["driver"]
        while "filename" not in node:
            node = node["file"]
        return Path(node["filename"]), image_format

    def _format(self, image: Path) -> str:
        return next((disk.format for disk in self.disks if disk.image == image), "qcow2")
