# SPDX-License-Identifier: Apache-2.0
"""The product as its users meet it: its commands, exit codes and output."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from lab.patience import PATIENCE

T = TypeVar("T")
Argument = str | Path | int


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    def check(self, code: int = 0) -> Self:
        """Assert the exit code; the failure shows all that was printed."""
        assert self.code == code, str(self)
        return self

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Standard output as one JSON object a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    def __str__(self) -> str:
        command = " ".join(self.argv)
        return f"{command}\nexit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Running:
    """A command under way. Use as a context manager: whatever happens, it is over afterwards."""

    def __init__(
        self,
        argv: tuple[str, ...],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.argv = argv
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            pass_fds=pass_fds,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def unless_over(self, question: Callable[[], T]) -> Callable[[], T]:
        """A question to ask again and again, which fails at once, showing why, where this has ended."""

        def ask() -> T:
            assert self.process.poll() is None, str(self.wait())
            return question()

        return ask

    def wait(self, timeout: float = PATIENCE) -> Result:
        """Wait for the end.

        Raises:
            AssertionError: it did not end in time; it has been killed, and its output is shown.
        """
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            late = Result(self.argv, -signal.SIGKILL, out, err)
            raise AssertionError(f"not over after {timeout} s: {late}") from None
        return Result(self.argv, self.process.returncode, out, err)


def start(
    *arguments: Argument,
    program: str = "qmpbackup",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Running:
    """Start a command; see `Running`."""
    return Running((executable(program), *map(str, arguments)), env, cwd, pass_fds)


def executable(program: str) -> str:
    """Where a command of the product is."""
    return str(Path(sys.executable).with_name(program))


def run(
    *arguments: Argument,
    program: str = "qmpbackup",
    timeout: float = PATIENCE,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Run a command to its end: `run("--socket", vm.socket, "backup", …).check()`."""
    with start(*arguments, program=program, env=env, cwd=cwd) as running:
        return running.wait(timeout)
