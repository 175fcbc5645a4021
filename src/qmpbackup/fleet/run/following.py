# SPDX-License-Identifier: Apache-2.0
"""A backup that is followed while it runs: it tells how far it is, and is told how fast it may go.

Our ends of what `backup --progress-fd` and `--limit-fd` are the other ends of. Nothing here waits for
the backup, which may be anywhere.
"""

import json
import os
from contextlib import suppress
from typing import Final

from qmpbackup.errors import QmpBackupError, lack_of
from qmpbackup.plan.progress import DiskProgress, Progress, Stage

_PIECE: Final = 64 * 1024
_LONGEST: Final = 1024 * 1024
"""Bytes of what it tells at once; one that tells more is not listened to."""


class Followed:
    """Both pipes of a backup that is to be started."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes a second that it begins with (0: none).

        Raises:
            QmpBackupError, Exhausted: there can be no more pipes.
        """
        try:
            self._progress, self._theirs_to_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                self._theirs_to_read, self._limit = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                self._close(self._progress, self._theirs_to_write)
                raise
        except OSError as error:
            raise lack_of(error) or QmpBackupError(
                f"There is no pipe: {error.strerror}."
            ) from error
        self._told: int | None = None
        self._said = b""
        self._last: Progress | None = None
        self.limit(limit)

    @property
    def descriptors(self) -> tuple[int, int]:
        """Those that the backup gets, under the same numbers."""
        return self._theirs_to_write, self._theirs_to_read

    @property
    def words(self) -> list[str]:
        """What it is told of them."""
        write, read = self.descriptors
        return ["--progress-fd", str(write), "--limit-fd", str(read)]

    def started(self) -> None:
        """The backup has its ends."""
        self._close(*self.descriptors)

    def limit(self, limit: int) -> None:
        """Have it go as fast from now on. Where it cannot be told now, it is the next time."""
        if limit == self._told:
            return
        with suppress(OSError):  # it has ended, or has not read what it was told before
            os.write(self._limit, b"%d\n" % limit)
            self._told = limit

    def look(self) -> Progress | None:
        """How far it is; None before it has told anything."""
        with suppress(OSError):
            while piece := os.read(self._progress, _PIECE):
                self._said = (self._said + piece)[-_LONGEST:]
        *lines, self._said = self._said.rsplit(b"\n", 2)
        if lines:
            self._last = _parsed(lines[-1]) or self._last
        return self._last

    def close(self) -> None:
        """It has ended."""
        self._close(self._progress, self._limit)

    @staticmethod
    def _close(*fds: int) -> None:
        for fd in fds:
            os.close(fd)


def _parsed(line: bytes) -> Progress | None:
    """What an object tells; None where it is none."""
    try:
        told = json.loads(line)
        disks = tuple(
            DiskProgress(str(each["id"]), int(each["done"]), int(each["total"]))
            for each in told["disks"]
        )
        return Progress(str(told["vm"]), Stage(told["stage"]), disks)
    except (ValueError, KeyError, TypeError):
        return None
