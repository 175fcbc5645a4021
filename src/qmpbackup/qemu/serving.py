# SPDX-License-Identifier: Apache-2.0
"""QEMU's NBD server: started for us alone, its exports, and its end.

QEMU has one server, and no command that tells whether it runs or whose it is. Ours listens at a
socket in a private folder, which we open ourselves and pass by descriptor, so that QEMU needs no
right on the path (over TCP no descriptor can be passed; QEMU then opens the path). An object in QEMU
says that a run began to start a server, and the kernel says whether QEMU still holds the socket of
that run: both together prove that the server is ours to stop, whenever the run died.

Exports are ended by QEMU (`block-export-del`, hard) before anything below them goes, and never by
taking our connection away: QEMU 7.2 dies of a client that leaves where an iothread is involved.
"""

import re
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from qmpbackup.errors import CommandError, CommandTimeout, VmError
from qmpbackup.plan.commands import Command, Json
from qmpbackup.plan.names import RUN_PREFIX, SERVING, RunNames
from qmpbackup.qemu.monitor import Monitor
from qmpbackup.qemu.reply import objects
from qmpbackup.qemu.steps import Step, carry_out
from qmpbackup.undo import UndoStack

_SOCKET = "nbd"
_MARKER = re.compile(re.escape(RUN_PREFIX) + r"(?P<run>[0-9a-f]+)-" + SERVING + "[0-9]+")
_LISTENING = 0x10000
"""The flag of a socket that takes connections in /proc/net/unix (SO_ACCEPTCON, linux/net.h)."""

_TAKEN = "already running"
_GONE_SECONDS = 60.0
_POLL_SECONDS = 0.005


class ServerTaken(Exception):
    """Somebody else's NBD server runs in this QEMU."""


class Server:
    """Our NBD server in QEMU; `path` is its socket."""

    def __init__(self, monitor: Monitor, names: RunNames, undo: UndoStack) -> None:
        """Start it; its end is registered for undoing.

        Raises:
            ServerTaken: QEMU serves somebody else.
            VmError: QEMU refused.
        """
        self._monitor = monitor
        self._undo = undo
        marker = names.of(SERVING, 0)
        steps = UndoStack()
        try:
            add = Command("object-add", {"qom-type": "throttle-group", "id": marker})
            delete = Command("object-del", {"id": marker})
            carry_out(monitor, [Step(add, "remove the marker of the NBD server", delete)], steps)
            folder = Path(tempfile.mkdtemp(prefix=_folder_prefix(names.run)))
            steps.push("remove the socket of the NBD server", lambda: _remove(folder))
            self.path = str(folder / _SOCKET)
            _start(monitor, self.path, names)
        except BaseException as error:
            steps.run()
            if isinstance(error, CommandError) and _TAKEN in error.description:
                raise ServerTaken from error
            if isinstance(error, OSError):
                raise _no_socket(error) from error
            raise
        steps.move_to(undo)
        undo.push("stop the NBD server", lambda: monitor.execute(Command("nbd-server-stop")))

    def export(self, additions: Sequence[Command], undo: UndoStack | None = None) -> None:
        """Add exports (`commands.export_add`); their end is registered for undoing, on the server's
        own stack unless another is given.

        Raises:
            CommandError: QEMU refused one.
        """
        names = [str(add.arguments["id"]) for add in additions]
        steps = [
            Step(add, f"end export {name}", partial(end_exports, self._monitor, [name]))
            for add, name in zip(additions, names, strict=True)
        ]
        carry_out(self._monitor, steps, self._undo if undo is None else undo)


def _no_socket(error: OSError) -> VmError:
    return VmError(
        f"Cannot make a socket in {tempfile.gettempdir()}: {error.strerror or error}.",
        "Set TMPDIR to a folder with a short name to which you may write.",
    )


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
        names = RunNames(match["run"])
        # A socket that waits in QEMU under its name, and one that is served, look alike outside.
        with suppress(CommandError):
            monitor.execute(_close_socket(names))
        if _is_listening(names.run):
            with suppress(CommandError):  # it waits in a monitor that is not this one
                monitor.execute(Command("nbd-server-stop"))
                yield "stopped the NBD server"
        for folder in Path(tempfile.gettempdir()).glob(f"{_folder_prefix(names.run)}*"):
            _remove(folder)


def _start(monitor: Monitor, path: str, names: RunNames) -> None:
    if not monitor.passes_descriptors:
        address: dict[str, Json] = {"type": "unix", "data": {"path": path}}
        monitor.execute(Command("nbd-server-start", {"addr": address}))
        return
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        name = names.of("listen", 0)
        monitor.send_descriptor(listener.fileno(), Command("getfd", {"fdname": name}))
    address = {"type": "fd", "data": {"str": name}}
    try:
        monitor.execute(Command("nbd-server-start", {"addr": address}))
    except CommandError:
        with suppress(CommandError):  # it has taken the socket already, or not
            monitor.execute(_close_socket(names))
        raise


def _close_socket(names: RunNames) -> Command:
    return Command("closefd", {"fdname": names.of("listen", 0)})


def _present(monitor: Monitor) -> set[str]:
    answer = monitor.execute(Command("query-block-exports"))
    return {export.text("id") for export in objects(answer, "query-block-exports")}


def _folder_prefix(run: str) -> str:
    return f"{RUN_PREFIX}{run}-"


def _is_listening(run: str) -> bool:
    """Whether anybody still listens at the socket of a run; unix(7) names no other way to ask."""
    start = f"/{_folder_prefix(run)}"
    with suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and start in fields[7] and int(fields[3], 16) & _LISTENING:
                return True
    return False


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        (folder / _SOCKET).unlink(missing_ok=True)
        folder.rmdir()
