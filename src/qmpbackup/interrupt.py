# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM, taken where a run can end in order and nowhere else.

A run holds the two signals back as a whole and asks at its own checkpoints whether one is waiting.
So no exception ever lands between a step and the registration of its undoing, nor inside the event
loop of the monitor. The kernel's set of pending signals is the only state.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from qmpbackup.errors import Interrupted

ENDING = frozenset({signal.SIGINT, signal.SIGTERM})


@contextmanager
def held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the end of the block.

    One that nobody took until a block has done its work came too late to end anything, and is
    forgotten: what is done is reported as done.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
        while waiting := signal.sigpending() & ENDING:
            signal.sigwait(waiting)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def let_through() -> Iterator[None]:
    """Take signals at once inside the block, as for somebody who waits at a terminal."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check() -> None:
    """Raise `Interrupted` if a held signal is waiting, and take it off the queue."""
    waiting = signal.sigpending() & ENDING
    if waiting:
        raise Interrupted(int(signal.sigwait(waiting)))
