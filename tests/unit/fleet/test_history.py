# SPDX-License-Identifier: Apache-2.0
"""The history: what was done is found again, and nothing that becomes of its file stops anybody."""

import fcntl
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qmpbackup.fleet.history import KILLED, History
from qmpbackup.fleet.records import Attempt, Holding, Work

NOW = datetime(2026, 11, 25, 2, 30, 0, 123456, tzinfo=UTC)
BEGUN = Attempt(Work.BACKUP, "db1", "main", "run-1", NOW, scheduled=NOW)
DONE = replace(
    BEGUN,
    ended=NOW + timedelta(seconds=14),
    exit_code=0,
    point="20261125T023000Z-1",
    level="inc",
    consistency="agent",
    added=2**40,
    read=5,
    pause=0.004,
)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.opened(tmp_path / "state") as opened:
        yield opened


def entered(history: History, *exit_codes: int | None, vm: str = "db1") -> None:
    for code in exit_codes:
        ended = None if code is None else NOW
        history.end(
            history.begin(replace(BEGUN, vm=vm)), replace(BEGUN, vm=vm, exit_code=code, ended=ended)
        )


def test_what_was_entered_is_read_back(tmp_path: Path) -> None:
    with History.opened(tmp_path) as history, history.running("run-1"):
        key = history.begin(BEGUN)
        assert history.attempts() == [BEGUN]
        history.end(key, DONE)
    with History.opened(tmp_path, read_only=True) as history:
        assert history.attempts() == [DONE]
        assert history.trouble == ""


def test_attempts_are_chosen_and_the_newest_comes_first(history: History) -> None:
    others = [
        replace(DONE, vm="web"),
        replace(DONE, work=Work.VERIFY),
        replace(DONE, target="offsite"),
        replace(DONE, started=NOW + timedelta(days=1)),
    ]
    for each in (DONE, *others):
        history.begin(each)
    assert history.attempts() == [*reversed(others), DONE]
    assert history.attempts(vm="web") == [others[0]]
    assert history.attempts(work=Work.VERIFY) == [others[1]]
    assert history.attempts(target="offsite") == [others[2]]
    assert history.attempts(since=NOW + timedelta(hours=1)) == [others[3]]
    assert history.attempts(limit=1) == [others[3]]
    assert history.last("db1", "main", Work.BACKUP) == others[3]
    assert history.last("db1", "nowhere", Work.BACKUP) is None


def test_the_last_attempt_is_the_one_that_was_entered_last_whatever_the_clock_said(
    history: History,
) -> None:
    leapt = replace(DONE, started=NOW - timedelta(days=30))
    for each in (DONE, leapt):
        history.begin(each)
    assert history.last("db1", "main", Work.BACKUP) == leapt


def test_the_last_success_is_found_behind_failures(history: History) -> None:
    entered(history, 0, 3, 7, 7)
    found = history.last("db1", "main", Work.BACKUP, succeeded=True)
    assert found is not None
    assert found.exit_code == 3


@pytest.mark.parametrize(
    ("codes", "count"),
    [
        ((), 0),
        ((0,), 0),
        ((7, 7, 0), 0),
        ((0, 7), 1),
        ((0, 7, 6, 3, 8), 1),
        ((7, 7), 2),
        ((7, 13, 7), 2),  # that it was off in between says nothing
        ((0, 13), 0),
        ((7, 143), 1),
        ((7, -9), 2),
    ],
)
def test_failures_are_counted_since_the_last_success(
    history: History, codes: tuple[int, ...], count: int
) -> None:
    entered(history, *codes)
    entered(history, 8, vm="another")
    assert history.failures_in_a_row("db1", "main") == count


@pytest.mark.parametrize(
    ("attempts", "is_known"),
    [
        ([], False),
        ([(0, "agent"), (13, "")], False),
        ([(0, "agent"), (13, ""), (0, "offline"), (13, ""), (13, "")], True),
        ([(13, ""), (3, "offline")], True),
        ([(13, ""), (7, "offline"), (13, "")], False),
        ([(13, ""), (0, "offline"), (0, "crash"), (13, "")], False),  # it ran in between
        ([(13, ""), (0, "offline"), (6, ""), (13, "")], False),  # it did, and did not answer
    ],
)
def test_images_of_a_vm_that_is_off_are_backed_up_until_it_has_run_again(
    history: History, attempts: list[tuple[int, str]], is_known: bool
) -> None:
    for code, consistency in attempts:
        history.begin(replace(DONE, exit_code=code, consistency=consistency))
    assert (history.as_it_lies("db1", "main") is not None) is is_known


def test_images_of_a_vm_that_ran_in_between_are_backed_up_again(history: History) -> None:
    """Though no backup met it: it runs by day, and is off by night."""
    history.begin(replace(DONE, consistency="offline"))
    history.begin(replace(DONE, exit_code=13))
    history.ran({"db1": DONE.started - timedelta(hours=9)})
    assert history.as_it_lies("db1", "main") is not None
    history.ran({"db1": DONE.started + timedelta(hours=9)})
    assert history.as_it_lies("db1", "main") is None
    history.begin(replace(DONE, consistency="offline", started=DONE.started + timedelta(hours=20)))
    assert history.as_it_lies("db1", "main") is not None
    assert history.all_told() == {}


def test_an_attempt_whose_run_is_no_more_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from datetime import datetime, UTC; from pathlib import Path\n"
        "from qmpbackup.fleet.history import History\n"
        "from qmpbackup.fleet.records import Attempt, Work\n"
        "with History.opened(Path(sys.argv[1])) as history, history.running('run-1'):\n"
        "    history.begin(Attempt(Work.BACKUP, 'db1', 'main', 'run-1', datetime.now(UTC)))\n"
        "    print('begun', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        with History.opened(tmp_path, read_only=True) as history:
            (running,) = history.attempts()
            assert history.lives("run-1")
        assert (running.ended, running.exit_code) == (None, None)
        process.kill()
    with History.opened(tmp_path) as history:
        (killed,) = history.attempts()
        assert not history.lives("run-1")
        assert history.failures_in_a_row("db1", "main") == 1
        history.forget_before(datetime.now(UTC) - timedelta(days=1))
    assert (killed.ended, killed.exit_code) == (None, KILLED)
    assert "killed" in killed.reason
    assert list((tmp_path / "runs").iterdir()) == []


def test_holdings_names_and_messages_are_kept(tmp_path: Path) -> None:
    holding = Holding("db1", "main", NOW, NOW, "p1", "agent", 23, 1, "kvm3", "u-u", "")
    with History.opened(tmp_path) as history:
        history.note(replace(holding, points=1))
        history.note(holding)
        history.note(Holding("web", "main", NOW, problem="It does not open."))
        history.know("all", ["web", "db1"], NOW)
        history.know("all", ["db1"], NOW + timedelta(days=1))
        history.tell("late:db1", NOW)
        history.tell("late:web", NOW)
        history.tell("late:web", None)
    with History.opened(tmp_path) as history:
        assert history.holdings()[0] == holding
        assert history.holdings()[1].problem == "It does not open."
        assert history.known_vms() == {"all": ("db1", "web")}
        assert history.first_seen("db1") == NOW
        assert history.first_seen("nobody") is None
        assert history.told("late:db1") == NOW
        assert history.told("late:web") is None
        assert history.all_told() == {"late:db1": NOW}


def test_old_things_are_forgotten_but_for_the_last_success(history: History) -> None:
    for each in (DONE, DONE, replace(DONE, exit_code=7), replace(DONE, started=NOW + timedelta(1))):
        history.begin(replace(each, target="offsite") if each.exit_code == 7 else each)
    history.begin(replace(DONE, vm="web"))
    history.know("all", ["db1"], NOW)
    history.tell("x", NOW)
    history.forget_before(NOW + timedelta(hours=1))
    assert [each.vm for each in history.attempts()] == ["web", "db1"]
    assert history.known_vms() == {}
    assert history.all_told() == {}


@pytest.mark.parametrize(
    "broken",
    [
        b"this is no database at all, whatever its name says" * 100,
        b"SQLite format 3\0",
        b"\0" * 8192,
    ],
)
def test_a_broken_database_is_put_aside_and_begun_anew(
    tmp_path: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "history.db").write_bytes(broken)
    with caplog.at_level(logging.WARNING), History.opened(tmp_path) as history:
        history.begin(DONE)
        assert history.trouble == ""
    assert "put aside as history-broken.db" in caplog.text
    assert (tmp_path / "history-broken.db").read_bytes() == broken
    with History.opened(tmp_path) as history:
        assert history.attempts() == [DONE]


def test_a_database_that_breaks_while_it_is_used_is_begun_anew(tmp_path: Path) -> None:
    with History.opened(tmp_path) as history:
        for _ in range(300):
            history.begin(DONE)
        size = (tmp_path / "history.db").stat().st_size
        with (tmp_path / "history.db").open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(size - 4096))
        with closing(sqlite3.connect(tmp_path / "history.db")) as other, other:
            other.execute("PRAGMA user_version = 8")
            other.execute("PRAGMA user_version = 1")  # so that its pages are read again
        key = history.begin(DONE)
        history.end(key, DONE)
        assert history.trouble == ""
        assert history.attempts() == [DONE]


def spoilt(path: Path, number: int) -> None:
    """A file that storage has done some harm to."""
    data, chance = bytearray(path.read_bytes()), random.Random(number)  # noqa: S311
    match chance.choice(("bytes", "page", "zeros", "end")):
        case "bytes":
            for _ in range(chance.choice((1, 5, 50))):
                data[chance.randrange(len(data))] = chance.randrange(256)
        case "page":
            start = chance.randrange(len(data) // 4096) * 4096
            data[start : start + 4096] = chance.randbytes(4096)
        case "zeros":
            start = chance.randrange(len(data) - 300)
            data[start : start + 300] = bytes(300)
        case "end":
            del data[chance.randrange(len(data)) :]
    path.write_bytes(data)


def read_all(history: History) -> None:
    history.holdings()
    history.known_vms()
    history.all_told()
    history.attempts()
    history.first_seen("vm1")
    history.failing("vm1", "main")
    history.last("vm1", "main", Work.BACKUP)


def test_whatever_became_of_its_bytes_it_stops_nobody(tmp_path: Path) -> None:
    """Whoever reads it, and whoever writes it."""
    whole, file = tmp_path / "whole.db", tmp_path / "history.db"
    with History.opened(tmp_path) as history:
        for number in range(60):
            history.begin(replace(DONE, vm=f"vm{number % 7}", reason="x" * 50))
            history.note(Holding(f"vm{number}", "main", NOW, NOW, "p", points=3))
            history.tell(f"ops|late|vm{number}", NOW)
        history.know("all", [f"vm{number}" for number in range(9)], NOW)
    file.rename(whole)
    for number in range(50):
        shutil.copy(whole, file)
        spoilt(file, number)
        with History.opened(tmp_path, read_only=True) as history:
            read_all(history)
        with History.opened(tmp_path) as history:
            read_all(history)
            history.end(history.begin(BEGUN), DONE)
            history.know("all", ["web"], NOW)
            history.tell("x", NOW)
            history.forget_before(NOW - timedelta(days=1))
            history.tell("x", NOW)
            assert history.told("x") == NOW
            assert history.trouble == ""


@pytest.mark.parametrize("read_only", [True, False])
def test_one_that_somebody_keeps_locked_stops_nobody(tmp_path: Path, read_only: bool) -> None:
    with History.opened(tmp_path) as history:
        history.begin(DONE)
    with (
        closing(sqlite3.connect(tmp_path / "history.db", isolation_level=None)) as other,
        History.opened(tmp_path, read_only=read_only, patience=0.1) as history,
    ):
        other.execute("BEGIN EXCLUSIVE")
        assert history.last("db1", "main", Work.BACKUP) is None, "nobody knows"
        assert "database is locked" in history.trouble
        history.tell("x", NOW)
        assert history.told("x") == NOW


@pytest.mark.parametrize(
    "statement",
    [
        "PRAGMA user_version = 7",
        "DROP TABLE told",
        "ALTER TABLE attempt RENAME COLUMN reason TO why",
        "DROP TABLE told; CREATE TABLE told (key TEXT, at INTEGER, by TEXT NOT NULL)",
    ],
)
def test_a_database_of_another_kind_is_put_aside(tmp_path: Path, statement: str) -> None:
    with History.opened(tmp_path) as history:
        history.begin(DONE)
    with closing(sqlite3.connect(tmp_path / "history.db")) as other, other:
        other.executescript(statement)
    with History.opened(tmp_path, read_only=True) as history:
        history.attempts()
        assert history.told("x") is None
    with History.opened(tmp_path) as history:
        history.tell("x", NOW)
        history.end(history.begin(BEGUN), BEGUN)
        assert history.trouble == ""
    assert (tmp_path / "history-broken.db").exists()


def test_it_may_be_deleted_at_any_time(tmp_path: Path) -> None:
    with History.opened(tmp_path) as history:
        history.begin(DONE)
        for path in tmp_path.glob("history*"):
            path.unlink()
        history.begin(DONE)
    with History.opened(tmp_path) as history:
        assert history.trouble == ""
        assert history.attempts() == []


def test_a_folder_that_cannot_be_made_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with History.opened(tmp_path / "file") as history, history.running("run-1"):
        history.end(history.begin(BEGUN), DONE)
        history.tell("x", NOW)
        assert history.attempts() == [DONE]
        assert history.told("x") == NOW
        assert "cannot be written" in history.trouble
    assert "Backups go on" in caplog.text


def test_a_database_that_may_only_be_read_goes_on_in_memory_with_what_it_has(
    tmp_path: Path,
) -> None:
    with History.opened(tmp_path) as history:
        history.begin(DONE)
        limit = history._file._connection.execute("PRAGMA page_count").fetchone()[0]
        history._file._connection.execute(f"PRAGMA max_page_count = {limit}")  # as a full disk
        for _ in range(100):
            history.begin(DONE)
        assert "full" in history.trouble
        assert len(history.attempts()) == 101
    with History.opened(tmp_path) as history:
        assert history.trouble == ""
        assert 1 <= len(history.attempts()) < 101


def test_nothing_is_made_where_it_is_only_read(tmp_path: Path) -> None:
    with History.opened(tmp_path / "state", read_only=True) as history:
        assert history.attempts() == []
        assert history.trouble == ""
    assert not (tmp_path / "state").exists()


def test_names_that_are_no_text_are_kept_all_the_same(history: History) -> None:
    history.begin(replace(DONE, vm="d\udcffb", reason="\ud800"))
    assert len(history.attempts(vm="d\udcffb")) == 1


@pytest.mark.parametrize("read_only", [False, True])
def test_a_history_of_an_earlier_version_is_read(tmp_path: Path, read_only: bool) -> None:
    """Which had no place in what targets held."""
    with History.opened(tmp_path) as history:
        history.note(Holding("db1", "main", NOW, points=3))
    with closing(sqlite3.connect(tmp_path / "history.db")) as earlier:
        earlier.execute("ALTER TABLE holding DROP COLUMN place")
    with History.opened(tmp_path, read_only=read_only) as history:
        assert [each.points for each in history.holdings()] == [3]
        assert (history.trouble, history.lost) == ("", "")
    with History.opened(tmp_path) as history:
        history.note(Holding("db1", "main", NOW, points=4, place="here"))
        assert [each.place for each in history.holdings()] == ["here"]


def test_a_run_that_is_taken_for_dead_as_it_begins_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one removes the locks of dead runs between its file and its lock."""
    with History.opened(tmp_path) as history, History.opened(tmp_path) as other:
        flock = fcntl.flock
        times: list[int] = []

        def cleans_up_before(fd: int, how: int) -> None:
            if how == fcntl.LOCK_EX and not times:
                times.append(fd)
                other.forget_before(NOW)
            flock(fd, how)

        monkeypatch.setattr(fcntl, "flock", cleans_up_before)
        with history.running("r1"):
            assert times
            assert other.lives("r1")
        assert not other.lives("r1")
