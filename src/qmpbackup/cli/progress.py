# SPDX-License-Identifier: Apache-2.0
"""Progress of a copy: a line that is redrawn on a terminal, and nothing anywhere else."""

import time
from typing import TYPE_CHECKING, Self, TextIO

from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.plan.progress import Progress

_CLEAR = "\r\x1b[K"


class ProgressLine:
    """Shows how far the jobs are; use as a context manager, which leaves the line clean."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write(_CLEAR)

    def show(self, now: "Progress") -> None:
        """Redraw: bytes of each disk, and rate and time left of them all."""
        if self._terminal and now.disks:
            disks = "  ".join(f"{human(each.done)}/{human(each.total)}" for each in now.disks)
            self._write(f"{_CLEAR}{disks}  {self._rate(now.done, now.total)}")

    def _rate(self, done: int, total: int) -> str:
        rate = done / max(time.monotonic() - self._started, 0.001)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        return f"{human(rate)}/s{left}"

    def _write(self, text: str) -> None:
        if self._terminal:
            self._stream.write(text)
            self._stream.flush()
