# SPDX-License-Identifier: Apache-2.0
"""What is logged, to systemd's journal in its own way: messages with fields beside them, which
`journalctl QMPBACKUP_VM=web` finds.

The protocol is a datagram with a line a field (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/). One that
is too large goes as a sealed file in memory.
"""

import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final, TextIO

from qmpbackup.cli.log_fields import Happening, fields_of

SOCKET: Final = "/run/systemd/journal/socket"

MESSAGE_IDS: Final = {
    Happening.BEGIN: "de458097359d4a509f099d86626e4d81",
    Happening.END: "d48c75f33f6b47328752bdd898492436",
    Happening.FAILURE: "2f3a5db7ac624b0ba3825d828769e3d8",
}
"""What `journalctl MESSAGE_ID=…` asks for. They never change."""

_NAMES: Final = {"exit_code": "QMPBACKUP_EXIT"}
_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
_DEBUG: Final = 7
_PATIENCE: Final = struct.pack("@ll", 10, 0)
"""Ten seconds, as `SO_SNDTIMEO` has it: so long may a journal be busy."""
_TOO_LARGE: Final = frozenset({errno.EMSGSIZE, errno.ENOBUFS})
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def is_journal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream leads to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    with suppress(OSError, ValueError):
        found = os.fstat(stream.fileno())
        return (device, inode) == (str(found.st_dev), str(found.st_ino))
    return False


class JournalHandler(logging.Handler):
    """Messages to the journal; where it takes none, they are `instead` handled so."""

    def __init__(self, instead: logging.Handler, path: str = SOCKET) -> None:
        super().__init__()
        self._instead = instead
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        try:
            self._send(b"".join(map(_line, _fields(record, self.format(record)))))
        except OSError:
            self._instead.handle(record)

    def _send(self, datagram: bytes) -> None:
        try:
            self._socket.sendto(datagram, self._path)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            fd = os.memfd_create("qmpbackup", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(datagram)
                file.flush()
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@i", fd))]
                self._socket.sendmsg([b""], rights, 0, self._path)

    def close(self) -> None:
        """No more."""
        self._socket.close()
        super().close()


def _fields(record: logging.LogRecord, message: str) -> Iterator[tuple[str, str]]:
    yield "MESSAGE", message
    yield "PRIORITY", str(next((p for level, p in _PRIORITIES if record.levelno >= level), _DEBUG))
    yield "SYSLOG_IDENTIFIER", "qmpbackup"
    for name, value in fields_of(record).items():
        if name == "event":
            yield "MESSAGE_ID", MESSAGE_IDS[Happening(str(value))]
        else:
            yield _NAMES.get(name, f"QMPBACKUP_{name.upper()}"), str(value)


def _line(field: tuple[str, str]) -> bytes:
    name, value = (part.encode("utf-8", "backslashreplace") for part in field)
    if b"\n" not in value:
        return name + b"=" + value + b"\n"
    return name + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
