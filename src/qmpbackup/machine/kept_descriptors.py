# SPDX-License-Identifier: Apache-2.0
"""Descriptors that QEMU does not let go of while the VM stands still, and a way without them.

Before 9.1, QEMU closes the descriptors that were handed over and taken back only while the VM runs
(monitor/fds.c, monitor_fdset_cleanup): what was removed goes on taking room, and its file system cannot
be unmounted. A QEMU of our own user that sees what we see can open our descriptors by itself, through
`/proc/PID/fd`, and closes what it has opened.
"""

import os
from pathlib import Path

from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply, objects
from qmpbackup.plan.commands import Command
from qmpbackup.plan.names import RUN_PREFIX

FIRST_TO_LET_GO = (9, 1)

SAID = (
    "The VM stands still, and QEMU before 9.1 keeps the files of this run open until it runs: until then "
    "the target's file system cannot be unmounted, and what is pruned there may give back no room."
)

_SAME = ("ns/pid", "ns/mnt", "ns/user", "root")
"""What makes a path under /proc mean the same to two processes."""


def are_kept(monitor: Monitor) -> bool:
    """Whether QEMU would keep descriptors now.

    Raises:
        VmError: QEMU cannot be asked.
    """
    if not monitor.passes_descriptors or monitor.version[:2] >= FIRST_TO_LET_GO:
        return False
    status = Reply(monitor.execute(Command("query-status")), "query-status")
    return not status.boolean("running")


def are_left(monitor: Monitor) -> bool:
    """Whether QEMU keeps descriptors of ours that were taken back.

    Raises:
        VmError: QEMU cannot be asked.
    """
    if not are_kept(monitor):
        return False
    sets = objects(monitor.execute(Command("query-fdsets")), "query-fdsets")
    found = (fd.text("opaque", "") for each in sets for fd in each.objects("fds"))
    return any(opaque.startswith(RUN_PREFIX) for opaque in found)


def are_open_to(pid: int | None) -> bool:
    """Whether this process can open our descriptors by their names under /proc: the same user with the
    same rights, the same view of processes and files, and the same confinement (ptrace(2))."""
    if pid is None:
        return False
    ours, theirs = Path("/proc/self"), Path(f"/proc/{pid}")
    try:
        same = all(_is_same(ours / what, theirs / what) for what in _SAME)
        return same and _rights(ours) == _rights(theirs)
    except OSError:
        return False


def name_of(fd: int) -> str:
    """The name under which another process opens our descriptor."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def _is_same(one: Path, other: Path) -> bool:
    first, second = one.stat(), other.stat()
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


def _rights(process: Path) -> tuple[list[str], str]:
    """User, groups' user and capabilities of a process, and how it is confined."""
    lines = (process / "status").read_text().splitlines()
    wanted = [line for line in lines if line.startswith(("Uid:", "Gid:", "CapEff:", "CapPrm:"))]
    try:
        label = (process / "attr" / "current").read_text()
    except OSError:
        label = ""
    return wanted, label
