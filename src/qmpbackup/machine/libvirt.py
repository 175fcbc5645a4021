# SPDX-License-Identifier: Apache-2.0
"""The names by which libvirt's users know the disks of a VM: `vda` beside the device `virtio-disk0`.

QEMU is not told them. libvirt keeps a file about each running VM beside the file with QEMU's process
id, which QEMU holds open, wherever this libvirt has its folders (libvirt src/qemu/qemu_process.c,
qemu_domain.c). Both are looked at as a stranger's; where anything is not as it should be, disks have
no such names.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, fromstring

from qmpbackup.model import Disk

_LARGEST = 1024 * 1024
"""Bytes of a file about a VM; a usual one has 20000."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{1,15}", re.ASCII)


_OWN_MONITOR = re.compile(r"/domain-\d+-[^/]*/monitor\.sock$")


def is_own_monitor(address: str) -> bool:
    """Whether an address is that of the monitor by which libvirt itself speaks to a VM."""
    return _OWN_MONITOR.search(address) is not None


def with_labels(disks: Iterable[Disk], pid: int | None) -> tuple[Disk, ...]:
    """The disks with libvirt's names for them, where libvirt has this VM and we may know."""
    disks = tuple(disks)
    known = labels(pid) if pid else {}
    taken = {name for disk in disks for name in (disk.id, *disk.aliases)}
    return tuple(
        replace(disk, label=label) if label and label not in taken else disk
        for disk in disks
        for label in [next((known[name] for name in disk.aliases if name in known), "")]
    )


def labels(pid: int) -> Mapping[str, str]:
    """The target name of each disk by its device's id; nothing where libvirt does not have the process."""
    for path in _beside_pid_files(pid):
        with suppress(OSError, ParseError, LookupError, ValueError):
            status = _parse(_read(path))
            if status.tag == "domstatus" and status.get("pid") == str(pid):
                return dict(_targets(status))
    return {}


def _beside_pid_files(pid: int) -> Iterator[Path]:
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                path = entry.readlink()
                if path.suffix == ".pid":
                    yield path.with_suffix(".xml")


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor, which may be anything's
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        data = file.read(_LARGEST + 1)
    return data if len(data) <= _LARGEST else b""


def _parse(data: bytes) -> Element:
    if b"<!DOCTYPE" in data or b"\0" in data:  # entities, which can stand for anything
        raise ParseError
    return fromstring(data)  # noqa: S314 - it defines no entity


def _targets(status: Element) -> Iterator[tuple[str, str]]:
    for disk in status.iterfind("./domain/devices/disk"):
        alias, target = disk.find("alias"), disk.find("target")
        if alias is not None and target is not None:
            name = target.get("dev", "")
            if _NAME.fullmatch(name):
                yield alias.get("name", ""), name
