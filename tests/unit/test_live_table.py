# SPDX-License-Identifier: Apache-2.0
"""The table that is redrawn in place: what stands on a real terminal's screen."""

import itertools
import logging
import os
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from lab.terminal import Terminal
from qmpbackup.cli.live_table import LiveRow, LiveTable, Meter, can_show, time_left

MIB = 1024 * 1024
GIB = 1024 * MIB

log = logging.getLogger("qmpbackup")


@pytest.fixture(autouse=True)
def xterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that can do what all can."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def drawn_on(terminal: Terminal) -> Iterator[LiveTable]:
    """A table on a terminal, to which is also logged; a second goes by from one look at the clock to the
    next."""
    ticks = itertools.count()
    stream = os.fdopen(terminal.fd, "w", closefd=False)
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with LiveTable(stream, ("VM", "TARGET"), clock=lambda: float(next(ticks))) as table:
            yield table
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # the terminal may have gone
            stream.close()


def row(name: str = "web1", done: int = 0, total: int = 3 * GIB, doing: str = "copy") -> LiveRow:
    """Something that goes on."""
    return LiveRow((name, "offsite"), doing, done, total)


def test_rows_are_redrawn_in_place_and_leave_nothing() -> None:
    with Terminal() as terminal:
        with drawn_on(terminal) as table:
            table.show([row(done=0), row("db1", doing="prepare", total=0)], "2 done · 3 waiting")
            table.show([row(done=300 * MIB), row("db1", total=0)], "2 done · 3 waiting")
            head, *rows, foot = terminal.text().splitlines()
            assert head.split() == ["VM", "TARGET", "DOING", "DONE", "RATE", "LEFT"]
            assert rows[0].split() == [
                *("web1", "offsite", "copy", "10%", "of", "3.0", "GiB", "300.0", "MiB/s", "0:09")
            ]
            assert rows[1].split() == ["db1", "offsite", "copy"]
            assert foot == "2 done · 3 waiting"
        assert terminal.text() == ""
        assert terminal.written.rfind(b"\x1b[?25h") > terminal.written.rfind(b"\x1b[?25l")


def test_what_is_logged_scrolls_by_above() -> None:
    sentence = "a sentence of many words " * 5
    with Terminal() as terminal:
        with drawn_on(terminal) as table:
            log.info("before")
            for number in range(3):
                table.show([row(done=number * MIB)], f"{number} done")
                log.info("%s%d", sentence, number)
            text = terminal.text()
            assert text.startswith("before\n")
            assert text.count("VM") == 1
            assert text.endswith("2 done")
            assert len(text.splitlines()) == 1 + 3 * 2 + 3
        log.info("nobody listens any more")
        assert "2 done" not in terminal.text()
        assert terminal.text().replace("\n", "").count("a sentence of many words") == 15


@pytest.mark.parametrize("columns", [20, 40, 55, 65, 80, 200])
def test_each_row_takes_one_line_on_any_terminal(columns: int) -> None:
    long = "a-name-that-is-far-too-long-for-any-column-of-any-table"
    with Terminal(columns) as terminal, drawn_on(terminal) as table:
        for done in (0, MIB):
            table.show([row(long, done), row(long + "2", done)], "3 done · 1 failed · 12 waiting")
        text = terminal.text()
        assert len(text.splitlines()) == 4
        assert text.count("copy") == 2
        assert "VM" in text
        assert text.splitlines()[-1].startswith("3 done")


def test_a_terminal_may_change_its_size() -> None:
    with Terminal(100) as terminal, drawn_on(terminal) as table:
        for columns in (100, 60, 40, 120):
            terminal.resize(columns)
            table.show([row(done=columns * MIB)], "1 waiting")
            text = terminal.text()
            assert len(text.splitlines()) == 3
            assert text.count("web1") == 1


def test_more_rows_than_lines_are_counted() -> None:
    with Terminal(80, 10) as terminal, drawn_on(terminal) as table:
        for done in (1, 2):
            table.show([row(f"vm{number}", done) for number in range(32)], "1 done")
        text = terminal.text()
        assert text.splitlines()[-1] == "26 more · 1 done"
        assert "vm5 " in text
        assert len(text.splitlines()) == 8


def test_no_color_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with Terminal() as terminal, drawn_on(terminal) as table:
        table.show([row()], "1 done")
        assert terminal.shows("web1")
        assert not [code for code in range(30, 50) if b"\x1b[%dm" % code in terminal.written]


@pytest.mark.parametrize("kind", ["dumb", "", "unknown"])
def test_a_terminal_that_can_redraw_nothing_gets_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", kind)
    with Terminal() as terminal:
        with drawn_on(terminal) as table:
            table.show([row()], "1 done")
            log.info("a line")
        assert terminal.text() == "a line"
        assert b"\x1b" not in terminal.written


def test_nothing_is_drawn_into_a_pipe() -> None:
    read, write = os.pipe()
    with os.fdopen(read) as ours, os.fdopen(write, "w") as theirs:
        assert not can_show(theirs)
        with LiveTable(theirs, ("VM",)) as table:
            table.show([row()])
        theirs.close()
        assert ours.read() == ""


def test_names_cannot_command_the_terminal() -> None:
    with Terminal() as terminal, drawn_on(terminal) as table:
        table.show([LiveRow(("\x1b[2Jx\ny[red]z[/red]", "t"), "copy")], "\x1b[2Jfoot")
        assert terminal.shows(r"\x1b[2Jx\ny[red]z[/red]", r"\x1b[2Jfoot")


def test_a_terminal_that_is_stopped_holds_up_no_drawing() -> None:
    """As by Ctrl-S."""
    with Terminal() as terminal:
        with drawn_on(terminal) as table:
            table.show([row()], "first")
            assert terminal.shows("first")
            termios.tcflow(terminal.fd, termios.TCOOFF)
            for _ in range(1000):
                table.show([row()], "second")
            termios.tcflow(terminal.fd, termios.TCOON)
            table.show([row()], "third")
            assert terminal.shows("third")
            assert b"second" not in terminal.written
        assert terminal.text() == ""


def test_a_terminal_that_has_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as commands have it
    terminal = Terminal()
    with drawn_on(terminal) as table:
        table.show([row()])
        os.close(terminal._ours)
        for _ in range(3):
            table.show([row()])
            log.info("a line")
    os.close(terminal.fd)


def test_a_rate_is_that_of_the_last_seconds() -> None:
    meter = Meter()
    for second in range(100):
        meter.note([row(done=second)], float(second))
    for second in range(20):
        meter.note([row(done=100 + second * 1000)], 100.0 + second)
    assert meter.rate(row()) == 1000
    meter.note([row(done=5, doing="store")], 120.0)
    assert meter.rate(row()) == 0, "another stage begins anew"
    meter.note([row(done=1, doing="store")], 121.0)
    assert meter.rate(row()) == 0
    meter.note([], 122.0)
    assert meter.rate(row()) == 0


def test_the_time_left_is_told_where_it_can_be() -> None:
    assert time_left(row(done=0, total=65), 1) == "1:05"
    assert time_left(row(done=0, total=7259), 1) == "2:00:59"
    assert time_left(row(done=0, total=10**9), 1) == "> 99 h"
    assert time_left(row(done=0, total=10), 0) == ""
    assert time_left(row(done=10, total=10), 5) == ""


def test_nothing_is_loaded_before_it_is_drawn() -> None:
    modules = (
        "qmpbackup.cli.main, qmpbackup.cli.run, qmpbackup.cli.run_report, qmpbackup.cli.backup"
    )
    code = f"import sys, {modules}; sys.exit('rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
