# SPDX-License-Identifier: Apache-2.0
"""What goes on, as one table that is redrawn in place, below what is logged. At a terminal only.

    with LiveTable(sys.stderr, ("VM", "TARGET")) as table:
        table.show([LiveRow(("web1", "main"), "copy", 3, 9)], "1 done · 2 wait")     again and again

Nothing is drawn before the first `show`, so that a password can be asked for, and nothing is left at the
end. What is logged meanwhile scrolls by above. A terminal that was stopped (Ctrl-S) holds up no drawing,
and one that is gone ends nothing. Must not know what the rows are.
"""

import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from qmpbackup.cli.printing import printable
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_EVERY: Final = 0.2
"""Seconds from one drawing to the next."""
_OVER: Final = 10.0
"""Seconds over which a rate is measured."""
_DUMB: Final = frozenset({"", "dumb", "unknown"})
_ROOM_FOR_OTHERS: Final = 4
"""Lines of a terminal that are not for rows: the head, the foot, the cursor, something logged."""
_USUAL: Final = 80, 24
"""Columns and lines of a terminal that does not tell."""
_WIDE_ENOUGH: Final = {"DONE": 34, "RATE": 70, "LEFT": 60}
_WIDE_ENOUGH_FOR_NAMES: Final = 50
"""Columns of a terminal below which these stand in none of ours; the first name always does."""


@dataclass(frozen=True, slots=True)
class LiveRow:
    """Something that goes on: what it is called, what it does, and how far it is in bytes (of 0: it
    cannot be told)."""

    names: tuple[str, ...]
    doing: str
    done: int = 0
    total: int = 0


class Meter:
    """Rates, measured over the last seconds, so that a change of pace is seen."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], deque[tuple[float, LiveRow]]] = {}

    def note(self, rows: Sequence[LiveRow], now: float) -> None:
        """Note how far all is; whatever is not among them has ended."""
        before = self._seen
        self._seen = {row.names: before.get(row.names, deque()) for row in rows}
        for row in rows:
            seen = self._seen[row.names]
            if seen and (seen[-1][1].doing != row.doing or seen[-1][1].done > row.done):
                seen.clear()
            seen.append((now, row))
            while now - seen[0][0] > _OVER and len(seen) > 2:
                seen.popleft()

    def rate(self, row: LiveRow) -> float:
        """Bytes a second; 0 where nothing moves."""
        seen = self._seen.get(row.names)
        if not seen or seen[-1][0] <= seen[0][0]:
            return 0.0
        return (seen[-1][1].done - seen[0][1].done) / (seen[-1][0] - seen[0][0])


def time_left(row: LiveRow, rate: float) -> str:
    """How long it takes yet, as `1:05` or `2:00:59`; empty where that cannot be told."""
    if rate <= 0 or row.done >= row.total:
        return ""
    seconds = int((row.total - row.done) / rate)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours > 99:
        return "> 99 h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def can_show(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether something can be redrawn there."""
    return stream.isatty() and environment.get("TERM", "") not in _DUMB


class LiveTable:
    """The table; use as a context manager. Where nothing can be redrawn it shows nothing."""

    def __init__(
        self,
        stream: TextIO,
        names: Sequence[str],
        *,
        is_wanted: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`names` are the heads of the columns of names."""
        self.is_shown = is_wanted and can_show(stream)
        self._stream = stream
        self._names = tuple(names)
        self._clock = clock
        self._meter = Meter()
        self._next = 0.0
        self._live: Live | None = None
        self._moved: list[logging.StreamHandler[TextIO]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handler in self._moved:
            handler.setStream(self._stream)
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()

    def show(self, rows: Sequence[LiveRow], below: str = "") -> None:
        """Draw it, unless that was done a moment ago."""
        now = self._clock()
        if not self.is_shown or now < self._next:
            return
        self._next = now + _EVERY
        self._meter.note(rows, now)
        if not _takes_more(self._stream):
            return
        from rich.console import ConsoleDimensions

        try:
            live = self._live or self._start()
            columns, lines = os.get_terminal_size(self._stream.fileno())
            live.console.size = ConsoleDimensions(columns or _USUAL[0], lines or _USUAL[1])
            live.update(self._drawn(live.console, rows, below), refresh=True)
        except OSError:
            self.is_shown = False  # the terminal has gone

    def _start(self) -> "Live":
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream, force_terminal=True, highlight=False, markup=False)
        self._live = live = Live(
            console=console,
            auto_refresh=False,  # no thread
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        live.start()
        console.show_cursor(True)  # or it would be gone for good where we are killed
        for handler in logging.getLogger("qmpbackup").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream:
                handler.setStream(_Above(console))
                self._moved.append(handler)
        return live

    def _drawn(self, console: "Console", rows: Sequence[LiveRow], below: str) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        room = max(1, console.height - _ROOM_FOR_OTHERS)
        if len(rows) > room:
            below = " · ".join(filter(None, (f"{len(rows) - room} more", below)))
        table = self._table(console.width, rows[:room])
        foot = Text(printable(below), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(table, foot) if below else Group(table)

    def _table(self, width: int, rows: Sequence[LiveRow]) -> "RenderableType":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        names = self._names if width >= _WIDE_ENOUGH_FOR_NAMES else self._names[:1]
        for name in names:
            table.add_column(name, max_width=30, min_width=4)
        table.add_column("DOING", no_wrap=True)
        measured = [name for name, enough in _WIDE_ENOUGH.items() if width >= enough]
        for name in measured:
            table.add_column(name, no_wrap=True, justify="right")
        for row in rows:
            # Cells that are cut, in columns that may shrink: a name never takes two lines.
            cells = (
                Text(printable(each), no_wrap=True, overflow="ellipsis")
                for each in row.names[: len(names)]
            )
            found = self._measured(row)
            table.add_row(*cells, row.doing, *(found[name] for name in measured))
        return table

    def _measured(self, row: LiveRow) -> Mapping[str, str]:
        rate = self._meter.rate(row)
        share = f"{min(row.done / row.total, 1):.0%} of {human(row.total)}" if row.total else ""
        return {
            "DONE": share,
            "RATE": f"{human(rate)}/s" if rate > 0 else "",
            "LEFT": time_left(row, rate),
        }


class _Above:
    """A stream of lines that scroll by above the table."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    def write(self, text: str) -> int:
        from rich.text import Text

        self._console.print(Text(text.removesuffix("\n")), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Each line is out at once."""


def _takes_more(stream: TextIO) -> bool:
    """Whether a terminal takes something now."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return bool(poll.poll(0))
