# SPDX-License-Identifier: Apache-2.0
"""A command of the product, and the most memory that it took.

The memory is what the kernel calls VmHWM (proc(5)), read in the process itself as its last act:
ru_maxrss counts what the process that started it had taken till then.
"""

import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.cli import Argument, Result, Running, executable

_MIB = 1 << 20
_NET = 4 << 30
"""Bytes of addresses after which the command is refused more, so that a fault fails a test and not the
machine."""

_PROGRAM = f"""
import os, resource, runpy, sys
from pathlib import Path
note, *sys.argv = sys.argv[1:]
def look():
    Path(note).write_text(Path("/proc/self/status").read_text())
def leave(code, end=os._exit):
    look()
    end(code)
os._exit = leave
resource.setrlimit(resource.RLIMIT_AS, ({_NET}, {_NET}))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    look()
"""


@dataclass(frozen=True)
class Watched:
    """How a command ended, and its memory at the peak."""

    result: Result
    mib: int


def run(
    *arguments: Argument,
    program: str = "qmpbackup",
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Watched:
    """Run a command to its end."""
    with tempfile.TemporaryDirectory(prefix="watched-") as folder:
        note = Path(folder) / "status"
        wrapper = (sys.executable, "-c", _PROGRAM, str(note))
        with Running((*wrapper, executable(program), *map(str, arguments)), env) as running:
            result = running.wait(timeout)
        assert note.exists(), f"it did not come to its end: {result}"
        peak = re.search(r"^VmHWM:\s+(\d+) kB", note.read_text(), re.MULTILINE)
        assert peak is not None
        return Watched(result, int(peak[1]) * 1024 // _MIB)
