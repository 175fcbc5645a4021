# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed, told to end, or held between two of their steps on a file system."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lab.cli import Argument, Running

PROGRAM = Path(__file__).with_name("at_file_step.py")


def signalled(
    number: signal.Signals,
    step: int | str,
    *arguments: Argument,
    program: str = "qmpbackup",
    env: Mapping[str, str] | None = None,
) -> Running:
    """Start a command that gets a signal before a step, which `at_file_step` says how to name."""
    # -P: what lies beside the program is no module of the product's, whatever its name.
    command = ("-P", PROGRAM, int(number), step, program, *arguments)
    return Running((sys.executable, *map(str, command)), env)


def killed(step: int | str, *arguments: Argument, program: str = "qmpbackup") -> bool:
    """Run a command that is killed before a step; false if it came to its end, and well, before."""
    with TemporaryDirectory(prefix="qmpb-") as scratch:  # what is killed leaves its folders there
        env = {"TMPDIR": scratch}
        with signalled(signal.SIGKILL, step, *arguments, program=program, env=env) as running:
            result = running.wait()
    assert result.code in {0, -signal.SIGKILL}, str(result)
    return result.code != 0


@contextmanager
def held(step: str, *arguments: Argument, program: str = "qmpbackup") -> Iterator[Running]:
    """Run a command up to a step, where it stands still for the block."""
    with signalled(signal.SIGSTOP, step, *arguments, program=program) as running:
        state = os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert state is not None
        assert state.si_code == os.CLD_STOPPED, str(running.wait())
        yield running
