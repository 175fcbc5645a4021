# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet, in one tree.

    QmpBackupError                  1  failed
    ├── UsageError                  2  the request itself is wrong
    ├── IncrementalNotPossible      4  `inc` or `diff` was asked for and cannot be right
    ├── QuiesceError                5  the guest could not be quiesced
    │   └── GuestStateUnknown          it may be frozen, or freeze later: outcome unknown
    ├── VmError                     6  QMP, the VM, or its block layer
    │   ├── ConnectError               no usable monitor at the address
    │   │   └── NobodyThere         13  nobody listens there: the VM is off
    │   ├── MonitorBusy                another client holds the monitor
    │   ├── MonitorProtocolError       what came back is not QMP
    │   ├── CommandError               QEMU refused a command (carries its class)
    │   ├── CommandTimeout             no answer in time: outcome unknown
    │   ├── ConnectionLost             the monitor went away: outcome unknown
    │   └── JobError                   a block job of ours failed
    ├── StorageError                7  target or scratch: no room, no right, I/O error
    │   └── Unreachable                what it lies on is not there now: not mounted, nobody answers
    ├── DamagedError                8  data is not what its manifest says
    ├── UnrecordedChanges           9  an audit found changes that no change bitmap had
    ├── NoSuchTarget               10  nothing of ours is there
    ├── Locked                     11  another run holds the VM or the target
    └── WrongPassword              12

    Exhausted                       1  no descriptor, memory or thread left: stands alone, as it says
                                       nothing of what was being done
    Interrupted           129/130/143  SIGHUP, SIGINT, SIGTERM: stands alone, as nothing has failed

Exit code 3 (done but degraded) is no error: the point exists. Each error carries one sentence that
says what is wrong (`message`) and one that says what to do (`hint`, may be empty).
"""

import errno
from typing import ClassVar, Final


class QmpBackupError(Exception):
    """Base of all errors with a sentence for the user and an exit code."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(QmpBackupError):
    """The request is wrong; nothing was touched."""

    exit_code = 2


class IncrementalNotPossible(QmpBackupError):
    """An incremental of some disk would not be right; nothing was touched."""

    exit_code = 4


class QuiesceError(QmpBackupError):
    """The guest's file systems could not be quiesced, or not for long enough."""

    exit_code = 5


class GuestStateUnknown(QuiesceError):
    """A freeze or thaw was sent and not confirmed: the guest may be frozen, now or later."""


class VmError(QmpBackupError):
    """Something between us and the VM failed."""

    exit_code = 6


class ConnectError(VmError):
    """No usable monitor at the address."""


class NobodyThere(ConnectError):
    """Nobody listens at the address: what did, has ended, or was never started. Of a monitor, that is a
    VM that is off, which is no failure for those who know that it may be."""

    exit_code = 13


class MonitorBusy(VmError):
    """The monitor accepted us and stayed silent: another client holds it."""


class MonitorProtocolError(VmError):
    """What came back is not QMP, or not of the type the command promises."""


class CommandError(VmError):
    """QEMU refused a command: it had no effect.

    `error_class` is QMP's class of the error, such as `GenericError` or `DeviceNotFound`.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class OutcomeUnknown(VmError):
    """A command was sent and no answer came: it may or may not have had its effect."""


class CommandTimeout(OutcomeUnknown):
    """No answer within the command's time limit."""


class ConnectionLost(OutcomeUnknown):
    """The monitor went away."""


class JobError(VmError):
    """A block job of ours failed for a reason on the VM's side (its view or its scratch)."""


class StorageError(QmpBackupError):
    """Target or scratch: no room, no right, or an I/O error."""

    exit_code = 7


class Unreachable(StorageError):
    """What it lies on is not there now: its server does not answer, its disk was taken away."""


class DamagedError(QmpBackupError):
    """Stored data is missing or not what its manifest says."""

    exit_code = 8


class UnrecordedChanges(QmpBackupError):
    """An audit found disks to have changed where their change bitmaps say that they have not.

    `disks` are their ids.
    """

    exit_code = 9

    def __init__(self, message: str, hint: str, disks: frozenset[str]) -> None:
        super().__init__(message, hint)
        self.disks = disks


class NoSuchTarget(QmpBackupError):
    """There is no target, or no such point, where we were told to look."""

    exit_code = 10


class Locked(QmpBackupError):
    """Another run holds the VM or the target."""

    exit_code = 11


class WrongPassword(QmpBackupError):
    """The password does not open the repository."""

    exit_code = 12


class Interrupted(Exception):
    """SIGHUP, SIGINT or SIGTERM: the run ended in order and left nothing behind.

    No `QmpBackupError`: whoever passes over what has failed must not pass over this.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"Interrupted by signal {signal_number}; the run was ended in order.")
        self.signal_number = signal_number

    @property
    def exit_status(self) -> int:
        """129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM, as shells report them."""
        return 128 + self.signal_number


class Exhausted(Exception):
    """This process, or this machine, has no more of something that is needed.

    No `QmpBackupError`: it says nothing of the data at which it came up, and whoever passes over what
    is damaged or missing must not pass over this.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message} {hint}")
        self.message = message
        self.hint = hint


_MORE_FILES: Final = "Raise the limit (ulimit -n, or LimitNOFILE= of the unit), and run again."
_MORE_MEMORY: Final = (
    "Give this process more (ulimit -v, or MemoryMax= of the unit), or free some, and run again."
)
_LONGER_FILES: Final = "Raise the limit (ulimit -f, or LimitFSIZE= of the unit), and run again."
_LACKING: Final = {
    errno.EMFILE: Exhausted("This process may not open any more files.", _MORE_FILES),
    errno.ENFILE: Exhausted("This machine has too many files open.", "See which program has."),
    errno.ENOMEM: Exhausted("There is not enough memory.", _MORE_MEMORY),
    errno.EFBIG: Exhausted("This process may not write any longer files.", _LONGER_FILES),
}
_SIGNS: Final = {
    "too many open files": errno.EMFILE,
    "cannot allocate memory": errno.ENOMEM,
    "failed to map segment": errno.ENOMEM,
    "memory allocation": errno.ENOMEM,
    "start new thread": errno.ENOMEM,
    "failed to allocate": errno.ENOMEM,
    "out of memory": errno.ENOMEM,
    "create new os thread": errno.ENOMEM,
    "resource temporarily unavailable": errno.ENOMEM,
}
"""What libraries and programs say in words alone, when they cannot be loaded or do their work."""


def lack_of(error: BaseException) -> Exhausted | None:
    """What this process has too little of, if that is what an error says."""
    if isinstance(error, Exhausted):
        return error
    if isinstance(error, MemoryError):
        return _LACKING[errno.ENOMEM]
    if isinstance(error, OSError) and error.errno == errno.EFBIG and not _files_are_limited():
        return None  # but the file system
    if isinstance(error, OSError) and error.errno in _LACKING:
        return _LACKING[error.errno]
    if isinstance(error, ImportError | RuntimeError) or type(error).__name__ == "PanicException":
        return lack_in(str(error))
    return None


def _files_are_limited() -> bool:
    import resource

    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY


def lack_in(text: str) -> Exhausted | None:
    """The same, from what a library or a program said."""
    said = text.lower()
    return next((_LACKING[code] for sign, code in _SIGNS.items() if sign in said), None)
