# SPDX-License-Identifier: Apache-2.0
"""Connections to what listens for a VM: its monitor, its guest agent. Must not know what is said there."""

import os
import socket
import stat
import struct
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from qmpbackup.errors import ConnectError, MonitorBusy, NobodyThere, UsageError

LONGEST_ADDRESS = 107
"""Bytes of a path in an address (unix(7), sun_path)."""

_PAUSE_SECONDS = 0.05
_LISTENS = "00010000"
"""What the kernel shows of a socket that listens (`__SO_ACCEPTCON`)."""


def peer_pid(connection: socket.socket) -> int | None:
    """Who is at the other end of a unix socket (unix(7), SO_PEERCRED)."""
    if connection.family != socket.AF_UNIX:
        return None
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid: int = struct.unpack("3i", credentials)[0]
    return pid or None


def open_socket(address: str, timeout: float) -> socket.socket:
    """Connect to `PATH`, `unix:PATH` or `tcp:HOST:PORT`; also how the guest agent is reached.

    Raises:
        UsageError: the address has no such form.
        NobodyThere: nobody listens there.
        ConnectError: we may not, or cannot, connect.
        MonitorBusy: so many wait there already that nobody else may.
    """
    try:
        if address.startswith("tcp:"):
            return socket.create_connection(_tcp_endpoint(address), timeout)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            _await_room(connection, address.removeprefix("unix:"), timeout)
        except BaseException:
            connection.close()
            raise
        return connection
    except FileNotFoundError:
        raise NobodyThere(
            f"There is no socket {address}.", "Check the path, and that the VM is running."
        ) from None
    except ConnectionRefusedError:
        _require_socket(address)
        raise NobodyThere(
            f"Nobody listens at {address}.", "Check that the VM is running."
        ) from None
    except BlockingIOError:
        require_running(address)
        raise MonitorBusy(
            f"{address} takes no further connection: others wait there already.",
            "Wait for their end, or give QEMU another -qmp socket for backups.",
        ) from None
    except PermissionError:
        raise ConnectError(
            f"No permission to connect to {address}.", "Run as root or as the VM's user."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConnectError(
            f"Cannot connect to {address}: {reason}.", "Check the address."
        ) from None


def _await_room(connection: socket.socket, path: str, timeout: float) -> None:
    """Connect, and where the queue of a socket is full, which is no matter of waiting for the system
    (connect(2), EAGAIN), wait for a place in it."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            _connect(connection, path)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def _connect(connection: socket.socket, path: str) -> None:
    """Connect to a path of any length: what is too long for an address (unix(7), sun_path) is reached
    by a descriptor of the socket's file."""
    if len(os.fsencode(path)) <= LONGEST_ADDRESS:
        connection.connect(path)
        return
    file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def is_held(address: str) -> bool:
    """Whether a process of this network namespace listens at a unix socket, even if its file is gone or is
    another's by now (proc_net_unix(5): flags, and the path it was bound to)."""
    return bool(_listening(address))


def require_running(address: str) -> None:
    """Say so where the process that listens at a unix socket is stopped, and so answers nobody.

    Raises:
        MonitorBusy: it is.
    """
    wanted = {f"socket:[{each}]" for each in _listening(address)}
    for process in Path("/proc").glob("[0-9]*") if wanted else ():
        with suppress(OSError):
            state = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            if state in {"T", "t"} and _has_open(process, wanted):
                raise MonitorBusy(
                    f"Process {process.name}, which listens at {address}, is stopped (SIGSTOP, or a "
                    "debugger): it answers nobody.",
                    f"Let it go on: kill -CONT {process.name}.",
                )


def _has_open(process: Path, wanted: Collection[str]) -> bool:
    return any(str(each.readlink()) in wanted for each in (process / "fd").iterdir())


def _listening(address: str) -> list[str]:
    """The inodes of sockets that take connections at an address."""
    path, found = address.removeprefix("unix:"), []
    with suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines():
            words = line.split(None, 7)
            if len(words) == 8 and words[7] == path and words[3] == _LISTENS:
                found.append(words[6])
    return found


def _require_socket(address: str) -> None:
    """Say so where a path leads to something else, which the system calls a refusal."""
    path = Path(address.removeprefix("unix:"))
    with suppress(OSError):
        if not address.startswith("tcp:") and not stat.S_ISSOCK(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a file"
            raise ConnectError(
                f"{address} is {kind}, not a socket.",
                "Give the path of QEMU's -qmp or guest agent socket.",
            )


def _tcp_endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"{address!r} is not an address of the form tcp:HOST:PORT.",
            "Write it like tcp:localhost:4444.",
        )
    return host.strip("[]"), int(port)
