# SPDX-License-Identifier: Apache-2.0
"""Handing files to QEMU by descriptor, so that QEMU needs no right on them.

QEMU often runs as another user or confined. A descriptor carries our right to the open file, and
what is at a path later on does not matter any more (QMP `add-fd`, file names `/dev/fdset/N`). Over
TCP no descriptor can be passed; QEMU then opens the path itself. Where QEMU would keep the descriptor
and can open ours by itself, it does (`kept_descriptors`).
"""

import os
from pathlib import Path

from qmpbackup.errors import UsageError
from qmpbackup.machine import kept_descriptors
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply
from qmpbackup.plan.commands import Command
from qmpbackup.undo import UndoStack


def hand_over(monitor: Monitor, fd: int, path: Path, name: str, undo: UndoStack) -> str:
    """Give QEMU an open file; return the file name under which it opens it.

    `name` marks the descriptor set as ours, for the recovery after a crash.

    Raises:
        UsageError: QEMU has to open the path itself, and the path is no UTF-8.
        VmError: QEMU refused.
    """
    if not monitor.passes_descriptors:
        return _absolute(path)
    if kept_descriptors.are_kept(monitor) and kept_descriptors.are_open_to(monitor.peer_pid):
        return kept_descriptors.name_of(fd)
    answer = monitor.send_descriptor(fd, Command("add-fd", {"opaque": name}))
    number = Reply(answer, "add-fd").integer("fdset-id")
    undo.push(
        f"take back the descriptor of {name}",
        lambda: monitor.execute(Command("remove-fd", {"fdset-id": number})),
    )
    return f"/dev/fdset/{number}"


def _absolute(path: Path) -> str:
    """The path as QEMU finds it, which runs in a folder of its own."""
    text = os.path.abspath(path)  # noqa: PTH100 - must not follow links
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"The path {text} is no UTF-8, and QMP is nothing else.",
            "Choose another path, or a unix socket, over which files are handed to QEMU by descriptor.",
        ) from None
    return text
