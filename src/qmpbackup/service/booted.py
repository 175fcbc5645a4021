# SPDX-License-Identifier: Apache-2.0
"""The VMs that have been booted: which there are, how each is, and how one is thrown away."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.errors import NoSuchTarget, QmpBackupError, UsageError, VmError
from qmpbackup.machine import booting
from qmpbackup.service.boot_folder import Boot, BootFolder, BootPhase, booted

_END_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A booted VM as `boot --list` shows it."""

    folder: BootFolder
    boot: Boot
    status: str
    kept: bool


def chosen(path: Path | None) -> BootFolder:
    """The booted VM in a folder, or the only one there is.

    Raises:
        UsageError: there are several.
        NoSuchTarget: there is none.
    """
    if path is not None:
        return BootFolder(path.absolute())
    found = list(booted())
    if not found:
        raise NoSuchTarget("No VM of this user is booted.", "Name its folder with --to DIR.")
    if len(found) > 1:
        names = ", ".join(str(each.path) for each in found)
        raise UsageError(f"Several VMs are booted: {names}.", "Name one with --to DIR.")
    return found[0]


def look() -> Iterator[Seen | QmpBackupError]:
    """All booted VMs of this user, and what is wrong with those that cannot be told of."""
    for folder in booted():
        try:
            yield seen(folder)
        except QmpBackupError as error:
            yield error


def seen(folder: BootFolder) -> Seen:
    """One of them as it is now."""
    there = folder.load()
    status = "busy"  # until it tells, as while it is settled
    with suppress(VmError):
        monitor = booting.reach(folder.monitor("settle"), 2.0)
        if monitor is None:
            status = "off"
        else:
            with monitor:
                status = booting.status(monitor)
    kept = folder.is_claimed("keeper")
    if status == "off" and not kept and folder.sockets.exists():
        with suppress(QmpBackupError), folder.claimed("keeper"):  # it was killed with its VM
            folder.remove_sockets()
    return Seen(folder, there, status, kept)


def end(folder: BootFolder) -> None:
    """End a booted VM and throw away what it has written.

    Raises:
        UsageError: it is settled: its disks are all there is of it.
        Locked: somebody moves it.
    """
    with folder.claimed():
        there = folder.load()
        if there.phase is BootPhase.SETTLED:
            raise UsageError(
                f"The VM in {folder.path} is settled: nothing depends on the backup, and its disks are "
                "all there is of it.",
                "Shut it down, and delete the folder yourself if you mean to.",
            )
        _stop(folder)
        with storage_errors(f"remove what is in {folder.path}"):
            for disk in there.disks:
                folder.overlay(disk).unlink(missing_ok=True)
                folder.base(disk).unlink(missing_ok=True)
            for file in [*folder.path.glob("*.log"), folder.path / "keeper.lock"]:
                file.unlink(missing_ok=True)
            (folder.path / "boot.json").unlink(missing_ok=True)
            (folder.path / "boot.lock").unlink(missing_ok=True)
        shutil.rmtree(folder.sockets, ignore_errors=True)
        folder.forget()
    with suppress(OSError):  # there may be files of somebody else
        folder.path.rmdir()


def _stop(folder: BootFolder) -> None:
    """End keeper, QEMU and server, whichever of them is there."""
    if folder.is_claimed("keeper"):
        with suppress(OSError, ValueError):
            booting.end(int((folder.path / "keeper.lock").read_text()), signal.SIGTERM, 10.0)
    for name, number in (("settle", signal.SIGKILL), ("point", signal.SIGTERM)):
        pid = booting.listener(folder.sockets / name)
        if pid is not None:
            booting.end(pid, number, _END_SECONDS)
