# SPDX-License-Identifier: Apache-2.0
"""A VM that stopped because there was no room left for its images while files of ours lay beside them.

QEMU stops a VM whose write finds no room (`werror=enospc`, its default) and tries that write again
when the VM is continued. A run marks a VM that runs with the file systems on which it takes room, by
an object in QEMU whose name holds their device numbers. So whoever clears up after the run, be it a
later one, knows that a VM which stands still for want of room there has to run again. A VM that
somebody else has stopped, or that stopped for want of room elsewhere, is never touched.
"""

import logging
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qmpbackup.errors import CommandError
from qmpbackup.machine import host_files
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply, objects
from qmpbackup.plan.commands import Command
from qmpbackup.plan.names import RUN_PREFIX
from qmpbackup.plan.sizes import human

log = logging.getLogger(__name__)

STOPPED = "io-error"
"""The state of a VM that stands still because of its storage (qapi/run-state.json)."""

ROOM_SECONDS = 10.0
"""How long room is waited for once ours has been given back: file systems may take a while."""

ENOUGH = 1024 * 1024
"""Bytes that must be free where the VM is to run again: less would stop it at once."""

_STOP_SECONDS = 2.0
"""How long a VM whose write has failed may take to stop."""

_STAYS_SECONDS = 0.5
_POLL_SECONDS = 0.05

_MARK = re.compile(re.escape(RUN_PREFIX) + r"ran(?P<devices>(?:-[0-9a-f]+)+)")


@dataclass(frozen=True, slots=True)
class Starved:
    """A VM that stands still for want of room: its disks, and where there was none. `runs` says that it
    runs again."""

    disks: tuple[str, ...]
    folders: tuple[Path, ...]
    runs: bool = False

    def __str__(self) -> str:
        where = ", ".join(map(str, self.folders))
        stopped = f"stopped because disk {', '.join(self.disks)} found no room in {where}"
        return f"the VM had {stopped}, and runs again" if self.runs else f"the VM {stopped}"


def mark(devices: Iterable[int]) -> Command:
    """The command that marks a running VM; nothing where no file system is concerned."""
    numbers = "".join(f"-{device:x}" for device in sorted(set(devices)))
    return Command("object-add", {"qom-type": "throttle-group", "id": f"{RUN_PREFIX}ran{numbers}"})


def unmark(marking: Command) -> Command:
    """The command that takes a mark away."""
    return Command("object-del", {"id": marking.arguments["id"]})


def is_mark(marker: str) -> bool:
    """Whether an object of ours is such a mark."""
    return _MARK.fullmatch(marker) is not None


def devices_of(markers: Iterable[str]) -> frozenset[int]:
    """The device numbers in all marks among these objects."""
    matches = filter(None, map(_MARK.fullmatch, markers))
    return frozenset(
        int(number, 16) for match in matches for number in match["devices"].split("-") if number
    )


def find(monitor: Monitor, devices: frozenset[int] | None = None) -> Starved | None:
    """The disks that found no room on these file systems (`None`: on any), if there are such.

    Raises:
        VmError: QEMU cannot be asked.
    """
    drives = objects(monitor.execute(Command("query-block")), "query-block")
    hungry = {_name(drive): _node(drive) for drive in drives if _is_hungry(drive)}
    if not hungry:
        return None
    below = host_files.below(monitor, hungry.values())
    disks: dict[str, Path] = {}
    for name, node in hungry.items():
        for file in below[node]:
            if file.written and (devices is None or _device(file.path) in devices):
                disks[name] = file.path.parent
    return Starved(tuple(disks), tuple(dict.fromkeys(disks.values()))) if disks else None


def feed(monitor: Monitor, devices: frozenset[int]) -> Starved | None:
    """Let a VM run again that stands still for want of room on these file systems, where there is room
    now, or will be soon.

    Raises:
        VmError: QEMU cannot be asked.
    """
    found = find(monitor, devices)
    if found is None or not _comes_to_a_stop(monitor):
        return None
    deadline = time.monotonic() + ROOM_SECONDS
    while time.monotonic() < deadline:
        if all(_free(folder) >= ENOUGH for folder in found.folders):
            with suppress(CommandError):
                monitor.execute(Command("cont"))
            if _stays_up(monitor):
                return replace(found, runs=True)
        time.sleep(_POLL_SECONDS)
    return found


def advice(found: Starved) -> str:
    """What to do about a VM that could not be let run again."""
    free = ", ".join(f"{human(_free(folder))} in {folder}" for folder in found.folders)
    return f"Make room ({free} are free), then run `qmpbackup recover`, or `cont` in a monitor."


def _comes_to_a_stop(monitor: Monitor) -> bool:
    """Whether the VM stands still for its storage's sake: QEMU notes the failed write first."""
    deadline = time.monotonic() + _STOP_SECONDS
    while (status := _status(monitor)) == "running" and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return status == STOPPED


def _stays_up(monitor: Monitor) -> bool:
    """Whether the VM runs, and still does when the write that failed has been tried again."""
    deadline = time.monotonic() + _STAYS_SECONDS
    while (status := _status(monitor)) == "running" and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return status != STOPPED


def _status(monitor: Monitor) -> str:
    return Reply(monitor.execute(Command("query-status")), "query-status").text("status")


def _is_hungry(drive: Reply) -> bool:
    return drive.text("io-status", "") == "nospace" and drive.optional("inserted") is not None


def _name(drive: Reply) -> str:
    qdev = drive.text("qdev", "").removesuffix("/virtio-backend").rpartition("/")[2]
    return qdev or drive.text("device", "")


def _node(drive: Reply) -> str:
    return drive.nested("inserted").text("node-name")


def _device(path: Path) -> int:
    try:
        return path.stat().st_dev
    except OSError:
        return -1


def _free(folder: Path) -> int:
    try:
        state = os.statvfs(folder)
    except OSError:
        return 0
    return state.f_bavail * state.f_frsize
