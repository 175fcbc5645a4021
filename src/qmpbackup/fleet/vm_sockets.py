# SPDX-License-Identifier: Apache-2.0
"""What the sockets of VMs tell of them, without asking: whether one may run, and when it was started."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

_REMOTE: Final = "tcp:"


@dataclass(frozen=True, slots=True)
class Trace:
    """Whether a VM may run, as far as its socket tells, and when it made that; None where nobody knows."""

    may_run: bool
    made: datetime | None = None


def is_remote(socket: str) -> bool:
    """Whether it is an address at which one can only ask."""
    return socket.startswith(_REMOTE)


def trace(socket: str) -> Trace:
    """What is seen of a socket. A VM on another host may run, and so may one in a folder that we may not
    enter."""
    if is_remote(socket):
        return Trace(may_run=True)
    try:
        made = datetime.fromtimestamp(Path(socket).stat().st_mtime, UTC)
    except (FileNotFoundError, NotADirectoryError):
        return Trace(may_run=False)
    except (OSError, ValueError, OverflowError):
        return Trace(may_run=True)
    return Trace(may_run=True, made=made)
