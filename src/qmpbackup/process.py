# SPDX-License-Identifier: Apache-2.0
"""The one way in which other programs are run: argument lists, captured output, never left behind.

Knows processes; must not know what the programs do. A child never outlives us: it is killed when a
block that waits for it is left in whatever way, and by the kernel when we die.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qmpbackup import interrupt
from qmpbackup.errors import Exhausted, QmpBackupError, lack_in, lack_of

if TYPE_CHECKING:
    import ctypes

_POLL_SECONDS = 0.1
_LARGEST_OUTPUT = 64 * 1024 * 1024
_KEPT_MESSAGES = 64 * 1024
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

NOTHING: Mapping[str, str] = {}


def ours(*words: str) -> list[str]:
    """A command of ours in a process of its own, which loads no module from where it is started."""
    return [sys.executable, "-P", "-m", "qmpbackup", *words]


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended. `code` is negative where a signal ended it."""

    program: str
    code: int
    output: bytes
    messages: str

    @property
    def reason(self) -> str:
        """What the program said last, or how it ended, as a clause without a full stop."""
        lines = [line.strip() for line in self.messages.splitlines() if line.strip()]
        if lines:
            return lines[-1].removeprefix(f"{self.program}: ").rstrip(".")
        if self.code < 0:
            return f"{self.program} was ended by signal {-self.code}"
        return f"{self.program} ended with code {self.code}"


def available_memory() -> int | None:
    """Bytes that programs may take without others being swapped out (proc(5)), where the kernel tells."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


class Child:
    """A running program; use as a context manager, which kills it unless it has ended."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] = NOTHING,
        at_our_death: signal.Signals = signal.SIGKILL,
        writable: Sequence[int] | None = None,
        given: int | None = None,
    ) -> None:
        """Start it, with the open file that is `given` as its input, if any, its output captured and its messages in English.

        `environment` is what it is told beside what we were told, `at_our_death` the signal that the
        kernel sends it when we die. With `writable`, it can open nothing for writing but these files,
        and what is in these folders (`landlock`).

        Raises:
            QmpBackupError: there is no such program, or it cannot be started.
        """
        import subprocess

        self.program = arguments[0].rpartition("/")[2]
        self._result: Result | None = None
        try:
            with _confinement(writable) as confine:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL if given is None else given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=pass_fds,
                    env={**os.environ, "LC_ALL": "C", **environment},
                    process_group=0,  # so that Ctrl-C reaches us alone, and we end it in order
                    preexec_fn=_Prepare(at_our_death, confine),  # noqa: PLW1509 - system calls only
                )
        except FileNotFoundError:
            raise QmpBackupError(
                f"The program {self.program} is not installed.", _INSTALL.get(self.program, "")
            ) from None
        except OSError as error:
            said = f"Cannot start {self.program}: {error.strerror}."
            lacking = lack_of(error)
            if lacking is not None:
                raise Exhausted(said, lacking.hint) from error
            raise QmpBackupError(said) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well; does not wait."""
        return bool(self._process.poll())

    @property
    def ended(self) -> bool:
        """Whether it has ended; does not wait."""
        return self._process.poll() is not None

    def catches(self, number: signal.Signals) -> bool:
        """Whether it has a handler for a signal (proc(5)), and so ends in order by it."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text("ascii", "replace").splitlines()
        except OSError:
            return False
        caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
        return bool(int(caught, 16) >> (number - 1) & 1)

    def ask_to_end(self) -> None:
        """Have it end in order, if it still runs; does not wait."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def end(self, seconds: float) -> Result:
        """Ask it to end in order, and wait for that, whatever signals come; kill it after `seconds`.

        For programs that print little: what they print is read at their end.
        """
        import subprocess

        if self._process.poll() is None:
            self._process.terminate()
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        if self._result is None:
            output, messages = (
                pipe.read(_KEPT_MESSAGES) if pipe is not None else b""
                for pipe in (self._process.stdout, self._process.stderr)
            )
            self._result = Result(self.program, code, output, messages.decode("utf-8", "replace"))
        return self._result

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for its end, collecting what it prints; the same answer when asked again.

        Args:
            timeout: seconds, after which it is killed.

        Raises:
            QmpBackupError: it took too long, or printed too much.
            Exhausted: it had too little memory, or too few descriptors.
            Interrupted: a signal is waiting.
        """
        import time

        if self._result is None:
            deadline = None if timeout is None else time.monotonic() + timeout
            output, messages = self._collect(deadline)
            self._result = Result(self.program, self._end(deadline), output, messages)
            require_enough(self._result)
        return self._result

    def _collect(self, deadline: float | None) -> tuple[bytes, str]:
        import selectors

        output, messages = bytearray(), bytearray()
        with selectors.DefaultSelector() as selector:
            for pipe, kept in ((self._process.stdout, output), (self._process.stderr, messages)):
                if pipe is not None:
                    selector.register(pipe, selectors.EVENT_READ, kept)
            while selector.get_map():
                for key, _ in selector.select(_POLL_SECONDS):
                    data = os.read(key.fd, 65536)
                    key.data.extend(data)
                    if not data:
                        selector.unregister(key.fileobj)
                del messages[:-_KEPT_MESSAGES]
                self._check(deadline, len(output))
        return bytes(output), messages.decode("utf-8", "replace")

    def _end(self, deadline: float | None) -> int:
        import subprocess

        while True:
            try:
                return self._process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                self._check(deadline, 0)

    def _check(self, deadline: float | None, printed: int) -> None:
        import time

        interrupt.check()
        if printed > _LARGEST_OUTPUT:
            raise QmpBackupError(f"{self.program} prints without end.")
        if deadline is not None and time.monotonic() > deadline:
            raise QmpBackupError(f"{self.program} did not finish in time.")


def require_enough(result: Result) -> None:
    """What a program that lacked something says of a file is no word on the file.

    Raises:
        Exhausted: it failed for that.
    """
    lacking = lack_in(result.messages) if result.code else None
    if lacking is not None:
        what = lacking.message[:1].lower() + lacking.message[1:]
        raise Exhausted(f"{result.program} failed: {what}", lacking.hint)


def run(
    arguments: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] = NOTHING,
    timeout: float | None = None,
    writable: Sequence[int] | None = None,
    given: int | None = None,
) -> Result:
    """Run a program to its end; its failure is in the result. `writable` and `given` are as for `Child`.

    Raises:
        QmpBackupError: it is not installed, or took longer than `timeout` seconds.
        Interrupted: a signal is waiting; the program was killed.
    """
    with Child(
        arguments, pass_fds=pass_fds, environment=environment, writable=writable, given=given
    ) as child:
        return child.wait(timeout)


_INSTALL = {
    "qemu-img": "Install it; on Debian and Ubuntu: apt install qemu-utils.",
    "nbdfuse": "Install it; on Debian and Ubuntu: apt install libnbd-bin fuse3.",
    "restic": "Install it; on Debian and Ubuntu: apt install restic.",
}


def _confinement(writable: Sequence[int] | None) -> AbstractContextManager[Callable[[], None]]:
    if writable is None:
        return nullcontext(lambda: None)
    from qmpbackup.landlock import Confinement

    return Confinement(writable)


class _Prepare:
    """Runs in the child before the program: die when we die, write to nothing else, and take signals
    again."""

    def __init__(self, number: signal.Signals, confine: Callable[[], None]) -> None:
        self._library = _c_library()
        self._parent = os.getpid()
        self._number = int(number)
        self._confine = confine

    def __call__(self) -> None:
        self._library.prctl(_PR_SET_PDEATHSIG, self._number, 0, 0, 0)
        if os.getppid() != self._parent:
            os._exit(127)
        self._confine()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _c_library() -> "ctypes.CDLL":
    import ctypes

    return ctypes.CDLL(None)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_OF_ITS_OWN = 4 << 20
_UNUSED = 64 << 20


def use_memory_again() -> None:
    """Have pieces of a megabyte that nobody needs any more be used for the next ones, in whatever thread;
    to be called before there are threads.

    glibc has a heap for each of some threads, each of which keeps such pieces for itself, so that a cache of
    a megabyte a piece takes twice what it holds. To give each piece back at once costs more than to decompress
    what goes into it: the kernel makes zeros of every page (mallopt(3)). So there is one heap, which keeps
    what was used once. Other C libraries do as they like.
    """
    library = _c_library()
    if hasattr(library, "mallopt"):
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, _OF_ITS_OWN)
        library.mallopt(_M_TRIM_THRESHOLD, _UNUSED)
