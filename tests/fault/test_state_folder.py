# SPDX-License-Identifier: Apache-2.0
"""The folder of the history cannot be written to, is full, or holds something else: backups go on, status tells
the truth, by the targets, and the exit code and one message say what is wrong."""

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.disks import MIB, Disk, create
from lab.qemu import Qemu
from lab.sinks import Web, web_server
from lab.small import needs_root, small_disk

pytestmark = needs_root

DEGRADED = 3
OK, WARNING, CRITICAL = 0, 1, 2


@dataclass
class Host:
    """A host with one VM and a state folder that is a file system of its own."""

    folder: Path
    state: Path
    vm: Qemu
    web: Web

    @property
    def history(self) -> Path:
        return self.state / "qmpbackup" / "history.db"

    def run(self, *words: str) -> cli.Result:
        return cli.run(
            *words,
            env={
                "XDG_STATE_HOME": str(self.state),
                "QMPBACKUP_CONFIG": str(self.folder / "config.toml"),
            },
        )

    @property
    def points(self) -> int:
        return len(self.run("list", "--target", str(self.folder / "backup"), "--json").objects)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        state = stack.enter_context(small_disk(tmp_path / "state", MIB))
        vm = stack.enter_context(Qemu([Disk("vda", create(tmp_path / "vda", MIB))], name="db1"))
        web = stack.enter_context(web_server())
        (tmp_path / "config.toml").write_text(
            f"""
[defaults]
limits = {{ pause = "1h" }}
[vm.db1]
socket = "{vm.socket}"
[target.main]
location = "{tmp_path}/backup"
verify = {{ every = "" }}
min_free = "0%"
[notify.ops]
type = "webhook"
url = "{web.url}"
"""
        )
        yield Host(tmp_path, state, vm, web)


@contextmanager
def full(host: Host) -> Iterator[None]:
    filler = host.state / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(512)):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(host: Host) -> Iterator[None]:
    _remount(host.state, "ro")
    try:
        yield
    finally:
        _remount(host.state, "rw")


@contextmanager
def broken_and_read_only(host: Host) -> Iterator[None]:
    host.history.write_bytes(b"rubbish" * 1000)
    with read_only(host):
        yield


@contextmanager
def locked(host: Host) -> Iterator[None]:
    with closing(sqlite3.connect(host.history, isolation_level=None)) as somebody:
        somebody.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def a_file_in_its_place(host: Host) -> Iterator[None]:
    shutil.rmtree(host.history.parent)
    host.history.parent.write_text("in the way")
    try:
        yield
    finally:
        host.history.parent.unlink()


def _remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def slow(value: object) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "trouble",
    [full, broken_and_read_only, slow(read_only), slow(locked), slow(a_file_in_its_place)],
)
def test_where_nothing_can_be_noted_backups_go_on_once_for_each_time(
    host: Host, trouble: Callable[[Host], AbstractContextManager[None]]
) -> None:
    host.run("run").check()
    with trouble(host):
        assert "cannot be written" in host.run("run", "--all").check(DEGRADED).err
        assert host.points == 2
        assert "Nothing is due" in host.run("run").check(DEGRADED).out
        assert host.points == 2
        assert "db1" in host.run("status", "--all").check().out
        assert b"cannot be written" in host.web.asked[0].body
    host.run("run")  # if it is broken, it is put aside now
    host.run("run").check()
    host.run("status", "--check").check(OK)
    assert host.points == 2


def overwritten(file: Path) -> None:
    file.write_bytes(b"rubbish" * 1000)


def cut_off(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 5000)


def of_another_version(file: Path) -> None:
    with closing(sqlite3.connect(file)) as somebody, somebody:
        somebody.executescript("DROP TABLE told; CREATE TABLE told (key TEXT)")


@pytest.mark.parametrize("spoil", [slow(overwritten), slow(cut_off), of_another_version])
def test_one_that_is_spoilt_is_put_aside_and_said_once(
    host: Host, spoil: Callable[[Path], None]
) -> None:
    host.run("run").check()
    spoil(host.history)
    status = host.run("status", "--check").check(WARNING)
    assert "db1" not in status.out
    assert "begun anew" in host.run("run").check(DEGRADED).err
    assert host.points == 1, "what is due is told by the point"
    assert host.history.with_name("history-broken.db").exists()
    assert [b"begun anew" in each.body for each in host.web.asked] == [True]
    host.run("run").check()
    assert [b"well again" in each.body for each in host.web.asked] == [False, True]
    host.run("status", "--check").check(OK)


def test_a_state_folder_that_vanished_is_made_again(host: Host) -> None:
    host.run("run").check()
    shutil.rmtree(host.history.parent)
    host.run("status", "--check").check(OK)
    assert "Nothing is due" in host.run("run").check().out
    assert host.points == 1
    assert host.history.exists()
