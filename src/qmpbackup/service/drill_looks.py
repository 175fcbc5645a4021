# SPDX-License-Identifier: Apache-2.0
"""Looking at a VM under drill: its agent, its serial ports, its screen, and how it ends.

What a guest says is judged elsewhere (`plan.verdict`); it is read within bounds.
"""

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import QuiesceError, VmError
from qmpbackup.machine.agent import Agent
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.pixels import Pixels
from qmpbackup.machine.screen import Screen, look
from qmpbackup.plan.booting import Launch
from qmpbackup.plan.verdict import BootVerdict, Observation
from qmpbackup.process import Child

_AGENT_SECONDS = 2.0
_EXEC_SECONDS = 60.0
_EXEC_POLL_SECONDS = 0.1
_NO_CODE = -1
_SCREEN_SECONDS = 1.0
_CONSOLE_BYTES = 64 * 1024
_LONGEST_LINE = 100


class Looks:
    """Looks at a VM again and again."""

    def __init__(self, launch: Launch, child: Child, monitor: Monitor, folder: Path) -> None:
        self.screen = Screen()
        self._launch = launch
        self._child = child
        self._monitor = monitor
        self._picture = folder / "screen.png"
        self._screen_since = self._picture_since = self._screen_next = time.monotonic()
        self._console = ""
        self._since = time.monotonic()
        self._agent: Agent | None = None
        self._colourful = False

    def close(self) -> None:
        """Let go of the agent."""
        if self._agent is not None:
            self._agent.close()

    def observe(self) -> Observation:
        """What is seen now."""
        text = "".join(_tail(Path(each)) for each in self._launch.consoles)
        if text != self._console:
            self._console, self._since = text, time.monotonic()
        end = self._child.end(5.0) if self._child.ended else None
        ended = end.reason if end else ""
        if not ended:
            self._look_at_screen()
        if self._agent is None and self._launch.agent and not ended:
            with suppress(QuiesceError):
                self._agent = Agent.connect(self._launch.agent, _AGENT_SECONDS)
        return Observation(
            console=text,
            still=time.monotonic() - self._since,
            screen=self.screen.text,
            screen_still=time.monotonic() - self._screen_since,
            picture_still=time.monotonic() - self._picture_since if self._colourful else 0.0,
            resets=self._monitor.resets,
            agent=self._agent is not None,
            has_agent=bool(self._launch.agent),
            ended=ended,
            killed=end is not None and end.code == -signal.SIGKILL,
        )

    def _look_at_screen(self) -> None:
        """See what the screen shows, now and then."""
        with suppress(VmError):  # it ends just now
            if time.monotonic() >= self._screen_next:
                before, self.screen = self.screen, look(self._monitor, self._picture)
                self._screen_next = time.monotonic() + _SCREEN_SECONDS
                if before.text != self.screen.text:
                    self._screen_since = time.monotonic()
                self._compare(before.pixels)

    def _compare(self, before: Pixels) -> None:
        """See whether the screen has shown the same picture full of colours since."""
        colourful = self.screen.pixels.is_colourful
        if not (colourful and self._colourful and self.screen.pixels.is_like(before)):
            self._picture_since = time.monotonic()
        self._colourful = colourful

    def shown(self) -> str:
        """What its screen shows, in words."""
        if self.screen.text:
            last = self.screen.text.rpartition("\n")[2].strip()
            return f"its screen ends with: {last[:_LONGEST_LINE]}"
        if self.screen.picture:
            return "its screen shows a picture of {}x{}".format(*self.screen.size)
        return "it has no screen"

    def system(self) -> str:
        """What the guest calls its operating system."""
        if self._agent is None:
            return ""
        with suppress(QuiesceError):
            found = self._agent.execute("guest-get-osinfo")
            if isinstance(found, dict):
                return str(found.get("pretty-name", ""))[:200]
        return ""

    def carry_out(
        self, commands: Sequence[str], reason: str, seconds: float = _EXEC_SECONDS
    ) -> tuple[BootVerdict, str]:
        """Have the guest carry out commands that must succeed, in so many seconds each."""
        if self._agent is None:
            return BootVerdict.UNKNOWN, "there is no guest agent to carry out --exec"
        for command in commands:
            try:
                code = self._carried_out(self._agent, command, seconds)
            except QuiesceError as error:
                return BootVerdict.UNKNOWN, f"{command!r} could not be carried out: {error.message}"
            if code != 0:
                return BootVerdict.FAIL, f"{command!r} ended with {code} in the guest"
        return BootVerdict.PASS, f"{reason}, and {len(commands)} commands succeeded"

    @staticmethod
    def _carried_out(agent: Agent, command: str, seconds: float) -> int:
        arguments = {"path": "/bin/sh", "arg": ["-c", command], "capture-output": False}
        begun = agent.execute("guest-exec", arguments)
        pid = begun.get("pid") if isinstance(begun, dict) else None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            interrupt.check()
            state = agent.execute("guest-exec-status", {"pid": pid})
            if isinstance(state, dict) and state.get("exited"):
                code = state.get("exitcode")
                return code if isinstance(code, int) else _NO_CODE  # such as ended by a signal
            time.sleep(_EXEC_POLL_SECONDS)
        raise QuiesceError("It does not end.")


def _tail(path: Path) -> str:
    """The end of what a serial port has printed."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _CONSOLE_BYTES))
        return file.read(_CONSOLE_BYTES).decode(errors="replace")
    return ""
