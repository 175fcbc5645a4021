# SPDX-License-Identifier: Apache-2.0
"""How a program that runs a backup follows and steers it: over descriptors that it has opened for that.

    --progress-fd N    we write how far we are, as one JSON object a line
    --limit-fd N       we read limits: a line with bytes a second (also 20M), `0` or `none`

Whoever is at the other end may end, or never look: no write waits, and none fails a backup. Each object
tells all there is to tell, so one that finds no room is left out. Where limits end, the last one holds.
"""

import argparse
import json
import logging
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from qmpbackup.errors import UsageError
from qmpbackup.plan.sizes import parse_size
from qmpbackup.plan.speed import Speed, unlimited

if TYPE_CHECKING:
    from qmpbackup.plan.progress import Progress, Watch

log = logging.getLogger(__name__)

_EVERY: Final = 0.25
"""Seconds from one object to the next, unless something begins."""
_LONGEST_LINE: Final = 4096
_MOST: Final = 2**63 - 1
"""QEMU counts in signed 64-bit numbers."""


def descriptor(text: str) -> int:
    """An `argparse` type for a descriptor that whoever started us has opened.

    One that we have opened ourselves, whatever for, is closed when a program is started; one that was
    passed on to us cannot be.
    """
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    try:
        if number >= 0 and os.get_inheritable(number):
            return number
    except OSError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is no descriptor that was passed on to this command; it is to be opened before, as "
        "with 3>FILE in a shell."
    )


@contextmanager
def telling(fd: int | None) -> "Iterator[Watch]":
    """Tell a program how far the backup is, for the block."""
    if fd is None:
        yield lambda _: None
        return
    lines = _Lines(fd)
    try:
        yield lines.tell
    finally:
        lines.close()


class _Lines:
    """What is written, without ever waiting for whoever reads it."""

    def __init__(self, fd: int) -> None:
        self._fd, self._is_open = _unblocked(fd), True
        self._rest = b""
        self._last: Progress | None = None
        self._next = 0.0

    def tell(self, now: "Progress") -> None:
        """Write an object, unless the last one is too near, or has found no room yet."""
        begins = self._last is None or self._last.stage is not now.stage
        if not begins and time.monotonic() < self._next:
            return
        self._last, self._next = now, time.monotonic() + _EVERY
        self._write_rest()
        if not self._rest:
            from qmpbackup import documents

            self._rest = json.dumps(documents.progress(now)).encode() + b"\n"
            self._write_rest()

    def _write_rest(self) -> None:
        """Write what there is room for; an object is never cut, but for what is written later."""
        while self._rest and self._is_open:
            try:
                self._rest = self._rest[os.write(self._fd, self._rest) :]
            except BlockingIOError:
                return
            except OSError as error:
                log.debug("Progress is told nobody any more: %s", error)
                self._rest = b""
                self.close()

    def close(self) -> None:
        if self._is_open:
            self._write_rest()
        if self._is_open:
            self._is_open = False
            with suppress(OSError):
                os.close(self._fd)


def _unblocked(fd: int) -> int:
    """A descriptor of our own that never waits. Opened anew where that goes, as not to wait is a mark that
    all who share an open file have in common: a terminal would become unfit for the shell."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND)
    except OSError:  # a socket
        os.set_blocking(fd, False)
        return os.dup(fd)


def limits(fd: int | None) -> Speed:
    """The limit that a program gives, whenever it is asked for."""
    return unlimited if fd is None else _Limits(fd)


class _Limits:
    """What is read, without ever waiting for whoever writes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._is_open = True
        self._rest = b""
        self._limit = 0

    def __call__(self) -> int:
        while self._is_open and self._poll.poll(0):
            self._read()
        return self._limit

    def _read(self) -> None:
        try:
            said = os.read(self._fd, _LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError as error:
            log.debug("Limits cannot be read any more: %s", error)
            said = b""
        self._is_open = bool(said)
        *lines, rest = (self._rest + said).split(b"\n")
        self._rest = rest[-_LONGEST_LINE:]
        for line in lines:
            self._take(line.decode("utf-8", "replace").strip())

    def _take(self, line: str) -> None:
        try:
            limit = 0 if line == "none" else min(parse_size(line), _MOST)
        except UsageError:
            log.warning("--limit-fd: %r is no limit; the last one holds.", line[:80])
            return
        if limit != self._limit:
            log.debug("The limit is %d bytes a second from now on.", limit)
            self._limit = limit
