# SPDX-License-Identifier: Apache-2.0
"""What is in the file of a lock of restic's: who holds the repository, since when, and whether alone.

Knows no repository; `lock` has the rules.
"""

import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from qmpbackup.restic import gojson
from qmpbackup.restic.keyfile import username

LARGEST: Final = 1 << 20
"""Bytes of a lock that are believed; restic's have some 200."""

STALE: Final = timedelta(minutes=30)
_INT64: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Lock:
    """What a lock says."""

    time: datetime
    exclusive: bool
    hostname: str
    username: str
    pid: int
    uid: int = 0
    gid: int = 0

    @classmethod
    def ours(cls, *, exclusive: bool) -> "Lock":
        """A new lock of this process."""
        return cls(
            time=datetime.now().astimezone(),
            exclusive=exclusive,
            hostname=socket.gethostname(),
            username=username(),
            pid=os.getpid(),
            uid=os.geteuid(),
            gid=os.getegid(),
        )

    @property
    def is_dead(self) -> bool:
        """Whether its process was one of this host, and is gone."""
        if self.hostname != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            return False
        return self.pid <= 0

    @property
    def is_stale(self) -> bool:
        """Whether it counts no more."""
        return datetime.now(UTC) - self.time > STALE or self.is_dead

    def __str__(self) -> str:
        since = self.time.astimezone().isoformat(" ", "seconds")
        user = f" ({self.username})" if self.username else ""
        alone = "exclusively " if self.exclusive else ""
        return f"{alone}by process {self.pid} on {self.hostname}{user} since {since}"


def encode(lock: Lock) -> bytes:
    """A lock as JSON."""
    members: dict[str, object] = {
        "time": lock.time,
        "exclusive": lock.exclusive,
        "hostname": lock.hostname,
        "username": lock.username,
        "pid": lock.pid,
    }
    members |= {name: id_ for name, id_ in (("uid", lock.uid), ("gid", lock.gid)) if id_}
    return gojson.dump(members).encode()


def parse(data: bytes, name: str) -> Lock:
    """The lock of this name.

    Raises:
        DamagedError: this is none.
    """
    what = f"The lock {name}"
    members = gojson.Members(gojson.load(data, what), what)
    return Lock(
        time=members.time("time"),
        exclusive=members.boolean("exclusive"),
        hostname=members.string("hostname"),
        username=members.string("username"),
        pid=members.number("pid", _INT64, -_INT64),
        uid=members.number("uid", gojson.UINT32),
        gid=members.number("gid", gojson.UINT32),
    )
