# SPDX-License-Identifier: Apache-2.0
"""QEMU's NBD server: started for us alone, its exports, and its end.

QEMU has one server, and no command that tells whether it runs or whose it is. Ours listens at a socket
without a name, which we hand over (`private_socket`). An object in QEMU says that a run began to start
a server and with which socket, and the kernel says whether QEMU still holds that one: both together
prove that the server is ours to stop, whenever the run died.

Exports are ended by QEMU (`block-export-del`, hard) before anything below them goes, and never by
taking our connection away: QEMU 7.2 dies of a client that leaves where an iothread is involved.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from qmpbackup.errors import CommandError, CommandTimeout
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.private_socket import (
    PrivateSocket,
    is_held,
    is_listened_at,
    named,
    remove,
)
from qmpbackup.machine.reply import objects
from qmpbackup.machine.steps import Step, carry_out
from qmpbackup.plan.commands import Command, Json
from qmpbackup.plan.names import RUN_PREFIX, SERVING, RunNames
from qmpbackup.undo import UndoStack

_MARKER = re.compile(re.escape(RUN_PREFIX) + r"(?P<run>[0-9a-f]+)-" + SERVING + "(?P<inode>[0-9]+)")

_TAKEN = "already running"
_GONE_SECONDS = 60.0
_POLL_SECONDS = 0.005


class ServerTaken(Exception):
    """Somebody else's NBD server runs in this QEMU."""


class NbdServer:
    """Our NBD server in QEMU; `path` is its socket."""

    def __init__(self, monitor: Monitor, names: RunNames, undo: UndoStack) -> None:
        """Start it; its end is registered for undoing.

        Raises:
            ServerTaken: QEMU serves somebody else.
            VmError: QEMU refused.
        """
        self._monitor = monitor
        self._undo = undo
        steps = UndoStack()
        try:
            if monitor.passes_descriptors:
                self.path = _start(monitor, names, steps)
            else:
                self.path = _start_at_path(monitor, names, steps)
        except BaseException as error:
            steps.run()
            if isinstance(error, CommandError) and _TAKEN in error.description:
                raise ServerTaken from error
            raise
        steps.move_to(undo)
        undo.push("stop the NBD server", lambda: monitor.execute(Command("nbd-server-stop")))

    def export(self, additions: Sequence[Command], undo: UndoStack | None = None) -> None:
        """Add exports (`commands.export_add`); their end is registered for undoing, on the server's
        own stack unless another is given.

        Raises:
            CommandError: QEMU refused one.
        """
        steps = [self._addition(add, str(add.arguments["id"])) for add in additions]
        carry_out(self._monitor, steps, self._undo if undo is None else undo)

    def _addition(self, add: Command, name: str) -> Step:
        return Step(add, f"end export {name}", partial(end_exports, self._monitor, [name]))


def end_exports(monitor: Monitor, names: Iterable[str]) -> None:
    """End exports, whoever reads them, and wait until QEMU has let go of their nodes.

    Raises:
        VmError: QEMU refused, or they did not end.
    """
    waiting = set(names)
    for name in waiting & _present(monitor):
        with suppress(CommandError):
            monitor.execute(Command("block-export-del", {"id": name, "mode": "hard"}))
    deadline = time.monotonic() + _GONE_SECONDS
    while waiting & _present(monitor):
        if time.monotonic() > deadline:
            raise CommandTimeout(f"Exports {', '.join(sorted(waiting))} did not end.")
        time.sleep(_POLL_SECONDS)


def recover(monitor: Monitor, markers: Iterable[str]) -> Iterator[str]:
    """Stop a server that a run which died has left, and remove its socket; the exports are gone
    already, and the markers are removed by the caller afterwards.

    Raises:
        VmError: QEMU refused.
    """
    for match in filter(None, map(_MARKER.fullmatch, markers)):
        names, inode = RunNames(match["run"]), int(match["inode"])
        # A socket that waits in QEMU under its name, and one that is served, look alike outside.
        with suppress(CommandError):
            monitor.execute(_close_socket(names))
        prefix = _prefix(names)
        if is_held(inode, monitor.peer_pid) if inode else is_listened_at(prefix):
            with suppress(CommandError):  # it waits in a monitor that is not this one
                monitor.execute(Command("nbd-server-stop"))
                yield "stopped the NBD server"
        remove(prefix)


def _start(monitor: Monitor, names: RunNames, steps: UndoStack) -> str:
    """Hand a socket over, and have QEMU serve there."""
    ours = PrivateSocket(_prefix(names))
    steps.push("close the socket of the NBD server", ours.close)
    _mark(monitor, names, ours.inode, steps)
    name = names.of("listen", 0)
    monitor.send_descriptor(ours.listener.fileno(), Command("getfd", {"fdname": name}))
    ours.listener.close()
    try:
        _serve(monitor, {"type": "fd", "data": {"str": name}})
    except CommandError:
        with suppress(CommandError):  # it has taken the socket already, or not
            monitor.execute(_close_socket(names))
        raise
    return ours.path


def _start_at_path(monitor: Monitor, names: RunNames, steps: UndoStack) -> str:
    """Have QEMU serve at a path of ours, to which it needs the right."""
    _mark(monitor, names, 0, steps)
    path = named(_prefix(names))
    steps.push("remove the socket of the NBD server", lambda: remove(_prefix(names)))
    _serve(monitor, {"type": "unix", "data": {"path": path}})
    return path


def _mark(monitor: Monitor, names: RunNames, inode: int, steps: UndoStack) -> None:
    marker = names.of(SERVING, inode)
    add = Command("object-add", {"qom-type": "throttle-group", "id": marker})
    delete = Command("object-del", {"id": marker})
    carry_out(monitor, [Step(add, "remove the marker of the NBD server", delete)], steps)


def _serve(monitor: Monitor, address: dict[str, Json]) -> None:
    monitor.execute(Command("nbd-server-start", {"addr": address}))


def _close_socket(names: RunNames) -> Command:
    return Command("closefd", {"fdname": names.of("listen", 0)})


def _present(monitor: Monitor) -> set[str]:
    answer = monitor.execute(Command("query-block-exports"))
    return {export.text("id") for export in objects(answer, "query-block-exports")}


def _prefix(names: RunNames) -> str:
    return f"{RUN_PREFIX}{names.run}-"
