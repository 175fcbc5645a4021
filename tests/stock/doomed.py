# SPDX-License-Identifier: Apache-2.0
"""A run with a watchdog that obeys a test, so that the test can kill, stop or resume it anywhere.

As a program it reads one order a line (JSON: a verb and its arguments) and prints one answer a line.
`DoomedRun` starts it and speaks with it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class DoomedRun:
    """The program as a process. A context manager; it and its watchdog are gone at the end."""

    def __init__(self, monitor: Path | None, agent: Path | None = None) -> None:
        tests = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stock.doomed", str(monitor or ""), str(agent or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent / 'src'}"},
        )
        self.watchdog_pid = int(self._read())
        self.watchdog = os.pidfd_open(self.watchdog_pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.watchdog, signal.SIGKILL)
        os.close(self.watchdog)

    def __call__(self, verb: str, *arguments: Any) -> Any:
        """Give an order and return what came of it."""
        self.tell(verb, *arguments)
        return json.loads(self._read())

    def tell(self, verb: str, *arguments: Any) -> None:
        """Give an order that is not answered, or not yet."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([verb, *arguments]).encode() + b"\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send the run a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self._process.kill()
        self._process.wait()

    def rest_of_output(self) -> bytes:
        """Read to the end of the run's output, which comes when nobody holds the pipe any more."""
        assert self._process.stdout
        return self._process.stdout.read()

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().decode()
        assert line, "the run ended"
        return line


def _answer(verb: str, arguments: Sequence[Any], parts: dict[str, Any]) -> Any:
    from qmpbackup.plan.commands import Command

    if verb == "qmp":
        return parts["qmp"].execute(Command(*arguments))
    if verb == "agent":
        return getattr(parts["agent"], arguments[0])(*arguments[1:])
    if verb == "raw":
        return os.write(parts[arguments[0]].fileno(), arguments[1].encode())
    return getattr(parts["watchdog"], verb)(*arguments)


def main() -> None:
    """Connect, start the watchdog, print its process id, obey."""
    from qmpbackup.errors import QmpBackupError
    from qmpbackup.machine.agent import Agent
    from qmpbackup.machine.monitor import Monitor
    from qmpbackup.machine.watchdog import Watchdog

    monitor = Monitor.connect(sys.argv[1]) if sys.argv[1] else None
    agent = Agent.connect(sys.argv[2]) if sys.argv[2] else None
    watchdog = Watchdog.start(
        monitor.fileno() if monitor else None, agent.fileno() if agent else None
    )
    print(watchdog.pid, flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            answer = _answer(
                verb, arguments, {"qmp": monitor, "agent": agent, "watchdog": watchdog}
            )
        except QmpBackupError as error:
            answer = f"{type(error).__name__}: {error.message}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
