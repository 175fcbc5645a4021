# SPDX-License-Identifier: Apache-2.0
"""A terminal, and what stands on its screen."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import pyte

from lab.patience import PATIENCE, wait_until


class Terminal:
    """A pseudo-terminal; use as a context manager, which ends what was started in it.

    `fd` is the end of programs. What they wrote is taken in whenever somebody looks; it takes the kernel a
    moment to pass it on, so we write something ourselves and wait for that.
    """

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self._ours, self.fd = os.openpty()
        os.set_blocking(self._ours, False)
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._process: subprocess.Popen[bytes] | None = None
        self._marks = 0
        self._written = b""
        self.resize(columns, lines)

    def resize(self, columns: int, lines: int = 24) -> None:
        """Make it wider or narrower, which cuts lines."""
        self._settle()
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen.resize(lines, columns)

    def start(
        self, argv: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> int:
        """Start a program that has it for all its streams; gives the process id."""
        self._process = subprocess.Popen(
            argv,
            stdin=self.fd,
            stdout=self.fd,
            stderr=self.fd,
            env={**os.environ, "TERM": "xterm-256color", **env},
            pass_fds=pass_fds,
            start_new_session=True,
        )
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send the program a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def is_over(self) -> bool:
        """Whether the program has ended."""
        return self._process is not None and self._process.poll() is not None

    def shows(self, *words: str) -> bool:
        """Whether all of this stands on the screen. Fails where it does not, and the program is over."""
        text = self.text()
        assert not self.is_over or all(word in text for word in words), text
        return all(word in text for word in words)

    def text(self) -> str:
        """What stands on the screen, without what is blank."""
        self._settle()
        lines = (line.rstrip() for line in self._screen.display)
        return "\n".join(line for line in lines if line)

    @property
    def written(self) -> bytes:
        """All that programs ever wrote."""
        self._take()
        return re.sub(rb"\x1b\]2;mark \d+\x07", b"", self._written)

    def wait(self) -> tuple[int, str]:
        """Wait for the end of the program: its exit code, and what it leaves on the screen."""
        assert self._process is not None
        wait_until(self._is_taken_and_over)
        return self._process.returncode, self.text()

    def _is_taken_and_over(self) -> bool:
        self._take()  # or it could not go on
        return self.is_over

    def _settle(self) -> None:
        """Take in all that was written so far."""
        self._marks += 1
        mark = f"mark {self._marks}"
        os.write(self.fd, f"\x1b]2;{mark}\x07".encode())  # a title

        def has_come() -> bool:
            self._take()
            return bool(self._screen.title == mark)

        wait_until(has_come)

    def _take(self) -> None:
        try:
            while said := os.read(self._ours, 65536):
                self._written += said
                self._stream.feed(said)
        except OSError:
            pass  # there is no more, or nobody has it open

    def close(self) -> None:
        """End what was started, and hang up."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE)
        for fd in (self.fd, self._ours):
            try:
                os.close(fd)
            except OSError:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
