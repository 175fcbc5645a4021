# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows while running VMs are backed up, and what is said where there is none."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import cli
from lab.disks import MIB, Disk, create, pattern
from lab.patience import wait_until
from lab.qemu import Qemu, StartQemu
from lab.terminal import Terminal

SIZE = 4 * MIB


@pytest.fixture
def host(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Two VMs and their configuration: how both are run at once, one of them for ever."""
    with ExitStack() as stack:
        tables = ["[run]\nparallel = 2", '[defaults]\nlimits = { pause = "1h" }']
        for name, more in (("db1", "limits = { speed = 1 }"), ("web1", "")):
            image = create(tmp_path / name, SIZE, contents=pattern(SIZE, 1))
            vm = stack.enter_context(Qemu([Disk("vda", image)], name=name))
            tables.append(f'[vm.{name}]\nsocket = "{vm.socket}"\n{more}')
        tables.append(f'[target.main]\nlocation = "{tmp_path}/backup/{{vm}}"')
        path = tmp_path / "config.toml"
        path.write_text("\n".join(tables))
        yield cli.executable("qmpbackup"), "run", "--config", str(path), "--all"


def test_a_run_is_one_table_and_lines_of_what_has_ended(
    host: tuple[str, ...], tmp_path: Path
) -> None:
    with Terminal(80) as terminal:
        terminal.start(host, {"XDG_STATE_HOME": str(tmp_path / "state")})
        ended = "web1 → main: backup: full"
        wait_until(lambda: terminal.shows(ended, "db1", "copy", "1 done"))
        assert "begins" not in terminal.text()
        terminal.resize(60)
        wait_until(lambda: is_narrow(terminal.text().splitlines()[-3:]))
        terminal.signal(signal.SIGTERM)
        code, left = terminal.wait()
    assert code == 143
    assert "DOING" not in left
    assert ended[:20] in left


def is_narrow(table: list[str]) -> bool:
    """Whether a table fits in sixty columns."""
    head, row, foot = (line.split() for line in table)
    return (head, row[:3], foot) == (
        ["VM", "TARGET", "DOING", "DONE", "LEFT"],
        ["db1", "main", "copy"],
        ["1", "done"],
    ) and max(map(len, table)) <= 60


def test_where_nothing_can_be_redrawn_there_are_lines(
    host: tuple[str, ...], tmp_path: Path
) -> None:
    with Terminal(200) as terminal:
        terminal.start(host, {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "dumb"})
        lines = (
            "db1 → main: backup begins.",
            "web1 → main: backup begins.",
            "web1 → main: backup: full",
        )
        wait_until(lambda: terminal.shows(*lines))
        terminal.signal(signal.SIGTERM)
        terminal.wait()
        assert b"\x1b" not in terminal.written
        assert "DOING" not in terminal.text()


def test_a_backup_shows_its_disks_in_the_same_way(tmp_path: Path, start_qemu: StartQemu) -> None:
    disks = [
        Disk(name, create(tmp_path / name, SIZE, contents=pattern(SIZE, 1)))
        for name in ("vda", "data")
    ]
    vm = start_qemu(disks)
    their_limit, limit = os.pipe()
    os.write(limit, b"1\n")
    command = (cli.executable("qmpbackup"), "--socket", str(vm.socket), "backup")
    arguments = ("--target", str(tmp_path / "target"), "--limit-fd", str(their_limit))
    with Terminal(100) as terminal:
        terminal.start((*command, *arguments), {}, (their_limit,))
        wait_until(lambda: shows_disks(terminal))
        os.write(limit, b"none\n")
        code, left = terminal.wait()
    os.close(limit)
    os.close(their_limit)
    assert code == 0
    assert "DOING" not in left
    assert "Disk vda: full" in left
    assert "2 disks" in left


def shows_disks(terminal: Terminal) -> bool:
    """Whether a terminal shows the table of a backup of two disks, below what was logged."""
    terminal.shows()
    *logged, head, one, two = ("\n" * 3 + terminal.text()).split("\n")
    rows = sorted(line.split()[:2] for line in (one, two))
    return (
        head.split()[:3] == ["DISK", "DOING", "DONE"]
        and rows == [["data", "copy"], ["vda", "copy"]]
        and any("Disk vda: full" in line for line in logged)
    )
