# SPDX-License-Identifier: Apache-2.0
"""Handing files to QEMU by descriptor, so that QEMU needs no right on them.

QEMU often runs as another user or confined. A descriptor carries our right to the open file, and
what is at a path later on does not matter any more (QMP `add-fd`, file names `/dev/fdset/N`). Over
TCP no descriptor can be passed; QEMU then opens the path itself.
"""

from pathlib import Path

from qmpbackup.plan.commands import Command
from qmpbackup.qemu.monitor import Monitor
from qmpbackup.qemu.reply import Reply
from qmpbackup.undo import UndoStack


def hand_over(monitor: Monitor, fd: int, path: Path, name: str, undo: UndoStack) -> str:
    """Give QEMU an open file; return the file name under which it opens it.

    `name` marks the descriptor set as ours, for the recovery after a crash.
    """
    if not monitor.passes_descriptors:
        return str(path)
    answer = monitor.send_descriptor(fd, Command("add-fd", {"opaque": name}))
    number = Reply(answer, "add-fd").integer("fdset-id")
    undo.push(
        f"take back the descriptor of {name}",
        lambda: monitor.execute(Command("remove-fd", {"fdset-id": number})),
    )
    return f"/dev/fdset/{number}"
