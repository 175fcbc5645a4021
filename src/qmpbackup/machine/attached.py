# SPDX-License-Identifier: Apache-2.0
"""Devices that hold data and are no block devices of QEMU's, so that no backup can have them.

What another process, the host's kernel or hardware serves passes QEMU by: it has no bitmap for it and no
view. Persistent memory, folders of the host and the state of a TPM are no disks at all. They are found by
the types of the guest's devices and named, so that nobody believes them to be in a point.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qmpbackup.errors import CommandError
from qmpbackup.machine.reply import objects
from qmpbackup.model import Absence, Skipped
from qmpbackup.plan.commands import Command

_PLACES = ("/machine/peripheral", "/machine/peripheral-anon")
"""Where QEMU keeps what was plugged in: with an id and without (system/qdev-monitor.c)."""

_CHILD = re.compile(r"child<(.+)>")

_SERVED = "another process serves it (vhost-user)"
_FOLDER = "it shares a folder of the host"
_MEMORY = "it is persistent memory"
_HARDWARE = "it is hardware of the host that is passed through"

_KINDS = (
    ("vhost-user-blk", _SERVED),
    ("vhost-user-scsi", _SERVED),
    ("vhost-user-device", _SERVED),
    ("vhost-user-fs", _FOLDER + " (virtio-fs)"),
    ("vhost-scsi", "the host's kernel serves it (vhost)"),
    ("vhost-vdpa-device", "hardware or another process serves it (vDPA)"),
    ("virtio-9p", _FOLDER + " (9p)"),
    ("usb-mtp", _FOLDER + " (MTP)"),
    ("nvdimm", _MEMORY),
    ("virtio-pmem", _MEMORY),
    ("cxl-type3", _MEMORY),
    ("vfio-user", "another process serves it (vfio-user)"),
    ("x-pci-proxy-dev", "another process serves it"),
    ("vfio-pci", _HARDWARE),
    ("vfio-ccw", _HARDWARE),
    ("usb-host", _HARDWARE),
    (
        "tpm-",
        "the state of a TPM is in a folder of swtpm's; a guest that seals keys there opens no disk without it",
    ),
    ("uefi-vars", "it keeps the firmware's variables in a file of its own"),
)
"""How the names of types begin, whatever bus they are for (`-pci`, `-ccw`, `-device`, …)."""

_PROPERTIES = {
    "vfio-pci": ("host",),
    "usb-host": ("hostbus", "hostaddr", "vendorid", "productid"),
    "uefi-vars": ("jsonfile",),
    "cxl-type3": ("persistent-memdev",),
}
"""What tells whether one of such a type holds data at all."""

_STORAGE_CLASSES = ("0x01", "0x05", "0x0805")
"""PCI classes of storage, memory and card readers, as sysfs writes them (PCI Code and ID Assignment)."""
_MASS_STORAGE = "08"
"""The interface class of USB mass storage."""


Ask = Callable[[Sequence[Command]], list[object]]
"""Carries out commands that only ask, as `Monitor.execute_each` does."""


def holding_data(ask: Ask, sysfs: Path = Path("/sys")) -> Iterator[Skipped]:
    """The devices that hold data and are in no point, or may be such.

    `sysfs` is where the kernel tells what hardware the host has (sysfs(5)).
    """
    listings = ask([Command("qom-list", {"path": path}) for path in _PLACES])
    for place, listing in zip(_PLACES, listings, strict=True):
        if isinstance(listing, CommandError):
            continue  # nothing was ever plugged in there
        for child in objects(listing, "qom-list"):
            kind = _CHILD.fullmatch(child.text("type", ""))
            if kind is not None:
                yield from _device(ask, sysfs, place, child.text("name"), kind[1])


def _device(ask: Ask, sysfs: Path, place: str, name: str, kind: str) -> Iterator[Skipped]:
    start, reason = next((each for each in _KINDS if kind.startswith(each[0])), ("", ""))
    if not start:
        return
    asked = _PROPERTIES.get(start, ())
    path = f"{place}/{name}"
    answers = ask([Command("qom-get", {"path": path, "property": each}) for each in asked])
    if asked and _is_harmless(start, answers, sysfs):
        return
    shown = name if place == _PLACES[0] else kind
    yield Skipped(shown, f"{kind}: {reason}", Absence.IMPOSSIBLE, (kind, name))


def _is_harmless(start: str, answers: Sequence[object], sysfs: Path) -> bool:
    """Whether one of a type that may hold data is known not to, such as a network card."""
    if start == "vfio-pci":
        return _is_other_pci(answers[0], sysfs)
    if start == "usb-host":
        return _is_other_usb(answers, sysfs)
    return answers[0] == ""


def _is_other_pci(host: object, sysfs: Path) -> bool:
    if not isinstance(host, str) or not re.fullmatch(r"[0-9a-fA-F:.]+", host):
        return False
    kind = _first_line(sysfs / "bus/pci/devices" / host / "class")
    return bool(kind) and not kind.startswith(_STORAGE_CLASSES)


def _is_other_usb(answers: Sequence[object], sysfs: Path) -> bool:
    """Whether all devices of the host that can be meant are there and none is a mass storage."""
    bus, address, vendor, product = (each if isinstance(each, int) else 0 for each in answers)
    files = (("busnum", bus, 10), ("devnum", address, 10))
    if vendor and product:
        files = (("idVendor", vendor, 16), ("idProduct", product, 16))
    meant = [
        device
        for device in (sysfs / "bus/usb/devices").glob("*")
        if all(_number(_first_line(device / file), base) == wanted for file, wanted, base in files)
    ]
    interfaces = [kind for device in meant for kind in device.glob("*/bInterfaceClass")]
    return bool(interfaces) and all(_first_line(each) != _MASS_STORAGE for each in interfaces)


def _number(text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        return -1


def _first_line(path: Path) -> str:
    try:
        return path.read_text("ascii").partition("\n")[0]
    except (OSError, UnicodeError):
        return ""
