# SPDX-License-Identifier: Apache-2.0
"""Images for the VMs of tests, and what is in them, by `qemu-img` alone."""

import hashlib
import json
import random
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lab.patience import PATIENCE

KIB = 1024
MIB = 1024 * KIB
CLUSTER = 64 * KIB

Bus = Literal["virtio-blk", "virtio-scsi", "ide", "nvme", "usb", "floppy"]

_BUS_ARGUMENTS: dict[Bus, tuple[str, ...]] = {
    "virtio-blk": ("-device", "virtio-blk-pci,drive={drive},id={id}{extra}"),
    "virtio-scsi": (
        "-device",
        "virtio-scsi-pci,id=scsi-{id}{iothread}",
        "-device",
        "scsi-hd,drive={drive},id={id},bus=scsi-{id}.0{device}",
    ),
    "ide": ("-device", "ide-hd,drive={drive},id={id}{extra}"),
    "nvme": ("-device", "nvme,drive={drive},id={id},serial={id}{extra}"),
    "usb": (
        "-device",
        "qemu-xhci,id=xhci-{id}",
        "-device",
        "usb-storage,drive={drive},id={id},bus=xhci-{id}.0{extra}",
    ),
    "floppy": (
        "-device",
        "isa-fdc,id=fdc-{id}",
        "-device",
        "floppy,drive={drive},id={id},bus=fdc-{id}.0{extra}",
    ),
}


@dataclass(frozen=True)
class Disk:
    """A disk of a VM: an image, and how the VM holds it.

    `id` is the guest device's id; the format node is called `node` and, where `filters` names
    drivers such as `throttle` or `copy-on-read`, each sits above the one before it.
    `iothread` names an iothread that the VM has. `device` holds further `key=value` of the device,
    `options` further options of the format node.
    """

    id: str
    image: Path
    format: str = "qcow2"
    bus: Bus = "virtio-blk"
    iothread: str = ""
    filters: tuple[str, ...] = ()
    device: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    read_only: bool = False

    @property
    def node(self) -> str:
        """The name of the format node."""
        return f"node-{self.id}"

    def arguments(self) -> list[str]:
        """Arguments of QEMU that give the VM this disk."""
        node: dict[str, Any] = {
            "driver": self.format,
            "node-name": self.node,
            "read-only": self.read_only,
            "file": {
                "driver": "host_device" if self.image.is_block_device() else "file",
                "filename": str(self.image),
                "node-name": f"file-{self.id}",
            },
            **({} if self.read_only else {"discard": "unmap"}),
            **self.options,
        }
        arguments = []
        for index, driver in enumerate(self.filters):
            arguments += ["-blockdev", json.dumps(node)]
            if driver == "throttle":
                group = f"group-{self.id}"
                arguments += ["-object", f"throttle-group,id={group}"]
            above = {"driver": driver, "node-name": f"{driver}{index}-{self.id}"}
            extra = {"throttle-group": group} if driver == "throttle" else {}
            node = above | extra | {"file": node["node-name"]}
        arguments += ["-blockdev", json.dumps(node), *self._device(str(node["node-name"]))]
        return arguments

    def _device(self, drive: str) -> list[str]:
        iothread = f",iothread={self.iothread}" if self.iothread else ""
        device = "".join(f",{option}" for option in self.device)
        return [
            part.format(
                drive=drive, id=self.id, device=device, iothread=iothread, extra=iothread + device
            )
            for part in _BUS_ARGUMENTS[self.bus]
        ]


def create(
    path: Path,
    size: int,
    format: str = "qcow2",  # noqa: A002 - the word of qemu-img
    *,
    contents: bytes | None = None,
    data_file: bool = False,
    backing: tuple[Path, str] | None = None,
    options: str = "",
) -> Path:
    """Make an image of `size` bytes, empty or with `contents`, and return its path.

    `options` are `qemu-img create -o` options such as `compat=0.10`; `backing` is a path and its
    format; `data_file` puts a qcow2's data into `<path>.data`.
    """
    arguments = ["create", "-q", "-f", format]
    all_options = [options] if options else []
    if data_file:
        all_options.append(f"data_file={path}.data")
    if all_options:
        arguments += ["-o", ",".join(all_options)]
    if backing:
        arguments += ["-b", str(backing[0]), "-F", backing[1]]
    qemu_img(*arguments, str(path), str(size))
    if contents is not None:
        write_contents(path, contents, format)
    return path


def filled(
    folder: Path,
    name: str,
    seed: int = 1,
    form: str = "qcow2",
    *,
    size: int = 16 * MIB,
    **options: Any,
) -> Disk:
    """A disk of a VM, with contents."""
    image = create(folder / f"{name}.{form}", size, form, contents=pattern(size, seed))
    return Disk(name, image, form, **options)


def write_contents(path: Path, contents: bytes, format: str = "qcow2") -> None:  # noqa: A002
    """Make an existing image hold these bytes; it must be of just their length."""
    with tempfile.NamedTemporaryFile(dir=path.parent) as raw:
        raw.write(contents)
        raw.flush()
        qemu_img("convert", "-n", "-f", "raw", "-O", format, raw.name, str(path))


def contents(path: Path, format: str | None = None) -> bytes:  # noqa: A002
    """All bytes that a guest would read from this image with its backing chain.

    Also right for an image that a stopped, flushed VM holds open (`Qemu.contents` sees to that).
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        raw = Path(folder) / "raw"
        source = ["-f", format] if format else []
        qemu_img("convert", "-U", *source, "-O", "raw", str(path), str(raw))
        return raw.read_bytes()


def digest(path: Path, format: str | None = None) -> str:  # noqa: A002
    """A digest of what `contents` returns, for images too large to hold in memory."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder) / "raw"
        source = ["-f", format] if format else []
        qemu_img("convert", "-U", *source, "-O", "raw", str(path), str(raw))
        with raw.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def pattern(size: int, seed: int) -> bytes:
    """Bytes that look like a disk in use: runs of random data, of text and of zeros."""
    chosen = random.Random(seed)  # noqa: S311 - repeatable on purpose
    kinds = (
        lambda: chosen.randbytes(CLUSTER),
        lambda: bytes([chosen.randrange(1, 256)]) * CLUSTER,
        lambda: bytes(CLUSTER),
    )
    whole = b"".join(chosen.choice(kinds)() for _ in range(0, size, CLUSTER))
    return whole[:size]


def first_difference(left: bytes, right: bytes, block: int = 512) -> str:
    """Where two contents differ, in words; empty where they are equal.

    Assert on this instead of on `==`, whose explanation of megabytes takes pytest minutes.
    """
    if left == right:
        return ""
    if len(left) != len(right):
        return f"lengths differ: {len(left)} and {len(right)}"
    offsets = range(0, len(left), block)
    wrong = [at for at in offsets if left[at : at + block] != right[at : at + block]]
    first = wrong[0]
    return (
        f"{len(wrong)} blocks of {block} differ, the first at {first:#x}: "
        f"{left[first : first + 8].hex()} and {right[first : first + 8].hex()}"
    )


def qemu_img(*arguments: str) -> str:
    """Run `qemu-img`; its output. A failure ends the test with what it printed."""
    done = subprocess.run(
        ["qemu-img", *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, f"qemu-img {' '.join(arguments)}: {done.stderr}{done.stdout}"
    return done.stdout
