# SPDX-License-Identifier: Apache-2.0
"""A VM that is off, as a session like that of one that runs: its images in a QEMU of our own.

Which VM it is, and which images it has, is what the newest point in the target says, unless the user
says it. Change bitmaps in the images are used and carried on as those of the running VM, so that the next
backup of that is an incremental, and so is this one where the image can store bitmaps.
"""

import socket
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup.errors import UsageError
from qmpbackup.machine import inventory, launching
from qmpbackup.machine.inventory import FoundVm
from qmpbackup.machine.launching import OfflineImage
from qmpbackup.machine.monitor import Monitor
from qmpbackup.model import Point, VmConfig, VmIdentity
from qmpbackup.service.session import Session
from qmpbackup.targets import opening
from qmpbackup.targets.interface import Address


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image as the user names it; the format is empty where it was left out."""

    id: str
    path: Path
    format: str = ""


@dataclass(frozen=True, slots=True)
class Offline:
    """A VM that is off: its images (none: as the newest point recorded them), and its name, where the
    target does not tell it."""

    images: tuple[NamedImage, ...] = ()
    vm: str = ""


@contextmanager
def opened(offline: Offline, place: Address, host: str = "") -> Iterator[Session]:
    """Open the images of a VM for the block; `host` is what the host of a new VM is called.

    Raises:
        UsageError: it cannot be told which VM it is, which images it has, or of what format.
        VmError: an image is open elsewhere, or QEMU cannot open it.
    """
    newest = opening.entrance(place).newest(offline.vm)
    config = newest.vm if newest else _config_of(offline, host)
    images = _images(offline, newest)
    program = next(iter(config.command_line), "")
    if not Path(program).name.startswith(("qemu", "kvm")):
        program = ""  # such as the loader of a QEMU with libraries of its own
    with launching.images_open(images, program) as monitor:
        inventory.require_version(monitor)

        def look() -> FoundVm:
            return _as_recorded(monitor, config, images)

        yield Session(monitor, look(), look)


def _config_of(offline: Offline, host: str) -> VmConfig:
    if not offline.vm:
        raise UsageError(
            "The target holds no point that tells which VM this is.", "Name it with --vm NAME."
        )
    return VmConfig(VmIdentity(name=offline.vm, host=host or socket.gethostname()), qemu_version="")


def _images(offline: Offline, newest: Point | None) -> Sequence[OfflineImage]:
    recorded = {disk.id: disk for disk in newest.disks} if newest else {}
    if not offline.images and not recorded:
        raise UsageError(
            "The target holds no point that tells which images the VM has.",
            "Name each: --image ID=PATH,format=FORMAT.",
        )
    named = offline.images or [
        NamedImage(disk.id, Path(disk.source_file), disk.source_format)
        for disk in recorded.values()
    ]
    twice = [disk_id for disk_id, times in Counter(each.id for each in named).items() if times > 1]
    if twice:
        raise UsageError(f"Two images are said to be disk {twice[0]}.", "Name each disk once.")
    known = {disk_id: disk.source_format for disk_id, disk in recorded.items()}
    images = [_image(each, each.format or known.get(each.id, "")) for each in named]
    _require_different(images)
    return images


def _require_different(images: Sequence[OfflineImage]) -> None:
    """Refuse two disks on one image, however it is spelled: QEMU would say of the second that another
    program has it open."""
    seen: dict[tuple[int, ...], OfflineImage] = {}
    for image in images:
        try:
            found = image.path.stat()
        except OSError:
            continue  # QEMU, or whoever starts it, says what is wrong with it
        is_device = stat.S_ISBLK(found.st_mode)
        other = seen.setdefault(
            (found.st_rdev,) if is_device else (found.st_dev, found.st_ino), image
        )
        if other is not image:
            raise UsageError(
                f"Disks {other.id} and {image.id} have one image: {other.path} and {image.path} are "
                "the same.",
                "Name the image of each, and each image once.",
            )


def _image(named: NamedImage, image_format: str) -> OfflineImage:
    if not named.path.is_absolute() and named.path.parts[:1] == ("json:",):
        raise UsageError(
            f"The image of disk {named.id} is no plain file: {named.path}.",
            f"Name it: --image {named.id}=PATH,format=FORMAT.",
        )
    if not image_format:
        # Never guessed: a guest may have written the header of another format into a raw disk.
        raise UsageError(
            f"The format of the image {named.path} of disk {named.id} is not known.",
            f"Say it: --image {named.id}={named.path},format=qcow2 (or raw, …).",
        )
    return OfflineImage(named.id, named.path, image_format)


def _as_recorded(monitor: Monitor, config: VmConfig, images: Sequence[OfflineImage]) -> FoundVm:
    """What the QEMU that has the images shows, as if it were the VM."""
    found = inventory.take(monitor)
    ids = {launching.node_name(number): image.id for number, image in enumerate(images)}
    disks = tuple(
        replace(disk, id=ids[disk.below_ours], aliases=(ids[disk.below_ours],))
        for disk in found.vm.disks
    )
    version = config.qemu_version or found.vm.config.qemu_version
    process = found.vm.config.process
    config = replace(config, qemu_version=version, process=process)
    vm = replace(found.vm, config=config, disks=disks)
    return replace(found, vm=vm)
