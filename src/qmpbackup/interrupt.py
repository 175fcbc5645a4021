# SPDX-License-Identifier: Apache-2.0
"""SIGINT, SIGTERM and SIGHUP, taken where a run can end in order and nowhere else.

A run holds these signals back as a whole and asks at its own checkpoints whether one is waiting.
So no exception ever lands between a step and the registration of its undoing, nor inside the event
loop of the monitor. The kernel's set of pending signals is the only state, but for SIGHUP where that
may be a mere question (`hangups_survived`).

One that was ignored when we were started (nohup, a job in the background of a script) stays so. The
kernel keeps it waiting all the same while it is held back (signal(7)), so it must not be asked for.

Who has another reason to end a run than a signal has it asked at the same places (`asking`).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from qmpbackup.errors import Interrupted

ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def heeded() -> frozenset[signal.Signals]:
    """Those signals of `ENDING` that are not ignored."""
    return frozenset(each for each in ENDING if signal.getsignal(each) is not signal.SIG_IGN)


_questions: ContextVar[tuple[Callable[[], None], ...]] = ContextVar("questions", default=())


@contextmanager
def held() -> Iterator[None]:
    """Hold the signals back until the end of the block.

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


@contextmanager
def asking(question: Callable[[], None]) -> Iterator[None]:
    """Have `check` ask this as well inside the block, in this thread: it raises what is to end the run,
    and that once, like a signal."""
    token = _questions.set((*_questions.get(), question))
    try:
        yield
    finally:
        _questions.reset(token)


def check() -> None:
    """Raise `Interrupted` if a held signal is waiting, and take it off the queue; else what a question
    raises. Only the main thread can end a run: in any other this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        return
    waiting = signal.sigpending() & heeded()
    for doorkeeper in _doorkeepers:
        waiting -= {signal.SIGHUP}
        doorkeeper.check()
    if waiting:
        raise Interrupted(int(signal.sigwait(waiting)))
    for question in _questions.get():
        question()


def put_back(number: int) -> None:
    """Have a signal that was taken wait again."""
    if number == signal.SIGHUP and _doorkeepers:
        _doorkeepers[-1].put_back()
    else:
        signal.raise_signal(number)


@contextmanager
def hangups_survived(program: str) -> Iterator[None]:
    """Inside the block, SIGHUP from processes of a program only asks whether we live.

    Where signals are held back, one from anybody else ends the run as ever; elsewhere none does.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
    elif signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        with _Doorkeeper(program):
            yield
    else:
        before = signal.signal(signal.SIGHUP, _survive)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)


_doorkeepers: "list[_Doorkeeper]" = []
"""Those at work, of nested blocks."""


class _Doorkeeper:
    """A thread that takes each SIGHUP at once, and keeps it for the next check if it is an order.

    Who sent it can be found out for as long as the sender lives. One who only asks may have ended by
    then, so somebody who is gone counts as such, unless the terminal or the session has ended.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._over = threading.Event()
        self._ordered = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="hangups", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        _doorkeepers.append(self)

    def __exit__(self, *_: object) -> None:
        _doorkeepers.remove(self)
        self._over.set()
        if self._thread.ident is not None and self._thread.is_alive():
            signal.pthread_kill(self._thread.ident, signal.SIGHUP)
        self._thread.join()
        if self._ordered.is_set():
            signal.raise_signal(signal.SIGHUP)

    def check(self) -> None:
        """Raise `Interrupted` if an order has come."""
        if self._ordered.is_set():
            self._ordered.clear()
            raise Interrupted(int(signal.SIGHUP))

    def put_back(self) -> None:
        """Have an order that was taken wait again."""
        self._ordered.set()

    def _keep(self) -> None:
        while not self._over.is_set():
            sender = signal.sigwaitinfo({signal.SIGHUP}).si_pid
            if not (self._over.is_set() or self._asks(sender)):
                self._ordered.set()

    def _asks(self, sender: int) -> bool:
        if sender in {0, os.getppid(), os.getsid(0)}:  # 0: the kernel, or from outside a container
            return False
        try:
            name = Path(f"/proc/{sender}/comm").read_text(errors="replace")
        except OSError:
            return True
        return name.startswith(self._program)


def _survive(*_: object) -> None:
    """A handler, not SIG_IGN, which the programs that we start would inherit."""
