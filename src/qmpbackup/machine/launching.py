# SPDX-License-Identifier: Apache-2.0
"""Images of a VM that is off, opened by a QEMU of our own that never runs a guest.

What a running VM gives us, such a QEMU gives as well: the same views, jobs and bitmaps, those in the
images included, which it loads as it opens them and stores as it ends. So a backup of images is a
backup of a VM that stands still.

    socketpair ── QEMU -S: a SCSI bus with a disk for each image, a monitor at the other end

The monitor has no name that anybody else could connect to. QEMU locks the images, so that none that
another QEMU has open is touched. It is ended in order (SIGTERM, by the kernel) when we are done and when
we die, and a process of ours that outlives us kills it where it does not end, so that nothing keeps the
VM from being started again.

Knows how QEMU is started; must not know what is done with the images.
"""

import json
import logging
import os
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qmpbackup.errors import ConnectError, QmpBackupError, UsageError, VmError
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.watchdog import detach
from qmpbackup.process import Child, Result, require_enough

log = logging.getLogger(__name__)

_START_SECONDS = 60.0
"""Longest wait for QEMU's greeting: images are opened before it, and storage may be slow."""

_END_SECONDS = 600.0
"""Longest wait for its end: bitmaps are stored then, and flushed."""

_PATIENCE = 60
"""Seconds that QEMU has to end after we have died."""

_CANDIDATES = ("qemu-system-x86_64", "qemu-kvm", "/usr/libexec/qemu-kvm", "qemu-system-aarch64")
_WITHOUT_DEFAULT_MACHINE = {"qemu-system-aarch64": "virt", "qemu-system-riscv64": "virt"}
_BUS = "images"


@dataclass(frozen=True, slots=True)
class OfflineImage:
    """A disk of a VM that is off: its disk id, its file or block device, and the format of that."""

    id: str
    path: Path
    format: str


@contextmanager
def images_open(images: Sequence[OfflineImage], program: str = "") -> Iterator[Monitor]:
    """Open images for the block; gives the monitor of the QEMU that has them open.

    `program` is the QEMU that the VM was last run with, if that is known.

    Raises:
        UsageError: an image is missing or of another format.
        VmError: no QEMU is installed, or it cannot open an image, such as one that a VM has open.
        Exhausted: QEMU finds too little memory, or too few descriptors.
    """
    for image in images:
        if not image.path.exists():
            raise UsageError(
                f"The image {image.path} of disk {image.id} is not there.",
                f"Name the one that is: --image {image.id}=PATH,format=FORMAT.",
            )
    ours, theirs = socket.socketpair()
    with _qemu(found_program(program), images, theirs) as child:
        try:
            monitor = Monitor.over(ours, "the images", _START_SECONDS)
        except ConnectError:
            result = child.end(_START_SECONDS)
            require_enough(result)
            raise _refused(result, images) from None
        try:
            yield monitor
        except VmError as error:
            result = child.end(_END_SECONDS)
            if result.code == 0:
                raise
            require_enough(result)
            raise VmError(
                f"QEMU, which had the images open for the backup, ended: {result.reason}.",
                "Run again.",
            ) from error
        finally:
            monitor.close()
            _end(child)


def found_program(program: str) -> str:
    """This QEMU, or the first that is installed.

    Raises:
        VmError: none is.
    """
    import shutil

    for candidate in (program, *_CANDIDATES):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise VmError(
        "Images of a VM that is off are opened by QEMU, which is not installed here.",
        "Install it; on Debian and Ubuntu: apt install qemu-system-x86.",
    )


@contextmanager
def _qemu(program: str, images: Sequence[OfflineImage], monitor: socket.socket) -> Iterator[Child]:
    machine = _WITHOUT_DEFAULT_MACHINE.get(Path(program).name)
    command = [
        *(program, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-m", "32"),
        *(("-machine", machine) if machine else ()),
        *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-device", json.dumps({"driver": "virtio-scsi-pci", "id": _BUS})),
        *(word for number, image in enumerate(images) for word in _disk(number, image)),
    ]
    with Child(command, pass_fds=[monitor.fileno()], at_our_death=signal.SIGTERM) as child:
        monitor.close()
        with never_left_behind(child.pid):
            yield child


@contextmanager
def never_left_behind(pid: int, seconds: float = _PATIENCE) -> Iterator[None]:
    """Have a process killed that is still there `seconds` after we have died within the block.

    QEMU 7.2 may wait for ever for a job that it is to cancel, when it is told to end just as that
    begins (seen in 1 of some 60 runs that were killed then).
    """
    pidfd = os.pidfd_open(pid)
    ending, ours = os.pipe()
    guard = os.fork()
    if guard == 0:
        _guard(ending, pidfd, seconds)
    os.close(ending)
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            os.write(ours, b"!")
        os.close(ours)
        os.close(pidfd)
        os.waitpid(guard, 0)


def _guard(ending: int, pidfd: int, seconds: float) -> NoReturn:
    """The life of the forked process; nothing of the run's code runs in it ever again."""
    try:
        detach({ending, pidfd})
        if not os.read(ending, 1):
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(1000 * seconds):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os._exit(0)


def _disk(number: int, image: OfflineImage) -> Sequence[str]:
    kind = "host_device" if image.path.is_block_device() else "file"
    node = {
        "driver": image.format,
        "node-name": node_name(number),
        "file": {"driver": kind, "filename": str(image.path.resolve())},
    }
    device = {"driver": "scsi-hd", "drive": node["node-name"], "bus": f"{_BUS}.0"}
    return ("-blockdev", json.dumps(node), "-device", json.dumps(device | {"scsi-id": number}))


def node_name(number: int) -> str:
    """The node of an image, by its place among those that are opened."""
    return f"image{number}"


def _refused(result: Result, images: Sequence[OfflineImage]) -> QmpBackupError:
    """Why QEMU did not start, in a sentence."""
    said = result.messages
    if '"write" lock' in said or '"consistent read" lock' in said:
        locked = next((each for each in images if str(each.path.resolve()) in said), None)
        several = " Of images that lie on one another, name the topmost." if images[1:] else ""
        return VmError(
            f"The image {locked.path if locked else 'of a disk'} is open in another program: the VM "
            "is not off.",
            f"Back it up over its monitor (--socket), or end what has the image open.{several}",
        )
    return VmError(
        f"QEMU cannot open the images: {result.reason.rpartition('}: ')[2]}.",
        "Check the paths and formats given with --image.",
    )


def _end(child: Child) -> None:
    """End QEMU, which stores the bitmaps."""
    result = child.end(_END_SECONDS)
    if result.code:
        log.warning(
            "QEMU did not end in order (%s); the next backup of these images may be a full.",
            result.reason,
        )
