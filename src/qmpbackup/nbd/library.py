# SPDX-License-Identifier: Apache-2.0
"""libnbd (Debian's python3-libnbd), which is imported when it is needed and not before: whether it is
there, and what its failures mean.
"""

from typing import Any

from qmpbackup.errors import QmpBackupError


class NbdError(Exception):
    """A request failed. `number` is the server's errno, 0 where the connection itself failed."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


def libnbd() -> Any:
    """The module.

    Raises:
        QmpBackupError: it is not installed.
    """
    try:
        import nbd
    except ImportError:
        raise QmpBackupError(
            "libnbd's module for Python is not installed.",
            "On Debian and Ubuntu: apt install python3-libnbd.",
        ) from None
    return nbd


def require_alive(handle: Any) -> None:
    """Raise where the connection of a handle is gone.

    Raises:
        NbdError: it is.
    """
    if _is_gone(handle):
        raise NbdError(0, "the connection was lost")


def failure(error: Any, handle: Any) -> NbdError:
    """What an error of the library means."""
    return NbdError(0 if _is_gone(handle) else error.errnum or 0, error.string)


def _is_gone(handle: Any) -> bool:
    return bool(handle.aio_is_dead() or handle.aio_is_closed())
