# SPDX-License-Identifier: Apache-2.0
"""Runs on one VM that share no folder for locks: of another user, in another mount namespace, in
another process namespace, over TCP. A living run is never taken for a dead one, nor a dead one for a
living one."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import is_copying, leftovers
from stock.scene import Scene, scene

LOCKED = 11

BORDERS = {
    "user": (
        *("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"),
        *("env", "-u", "XDG_RUNTIME_DIR", "HOME=/nonexistent"),
    ),
    "mounts": ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"),
    "processes": (
        *("unshare", "-m", "-p", "-f", "--mount-proc", "--kill-child=KILL"),
        *("sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"),
    ),
}
"""Ways to start a program that does not see the locks of others."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A scene whose second monitor, the test's own, another user may connect to."""
    with scene(tmp_path, args=("-qmp", "tcp:127.0.0.1:0,server=on,wait=off")) as stage:
        stage.vm.folder.chmod(0o755)
        for socket in (stage.vm.socket, stage.vm._test_socket):
            socket.chmod(0o666)
        stage.renew("inc")
        yield stage


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder where anybody may have a target."""
    folder = Path("/tmp") / f"qmpb-shared-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def beyond(border: str, *arguments: cli.Argument) -> cli.Running:
    """A command of the product on the other side of a border."""
    program = str(Path(sys.executable).with_name("qmpbackup"))
    if subprocess.run((*BORDERS[border], "test", "-x", program), check=False).returncode:
        pytest.skip("other users may not go where this checkout is")
    return cli.Running((*BORDERS[border], program, *map(str, arguments)))


def changing(socket: Path, target: Path) -> list[tuple[cli.Argument, ...]]:
    """The commands that would remove what a dead run has left."""
    return [
        ("--socket", socket, "backup", "--level", "auto", "--target", target),
        ("--socket", socket, "recover"),
        ("--socket", socket, "cleanup", "--remove-bitmaps"),
    ]


def looking(socket: Path) -> list[tuple[cli.Argument, ...]]:
    """The commands that would call a living run dead."""
    return [
        ("--socket", socket, "doctor"),
        ("--socket", socket, "recover", "--dry-run"),
        ("--socket", socket, "info", "--show", "blockdev"),
    ]


@pytest.mark.parametrize("border", BORDERS)
def test_a_living_run_is_left_alone(stage: Scene, elsewhere: Path, border: str) -> None:
    with stage.long_run() as running:
        stage.vm.qmp.close()
        socket = stage.vm._test_socket
        for command in (*changing(socket, elsewhere / "t"), *looking(socket)):
            with beyond(border, *command) as second:
                said = second.wait(60).check(LOCKED).err
            assert f"process {running.pid} on" in said
            assert "--lock-wait" in said
        with beyond(border, *changing(socket, elsewhere / "t")[0], "--lock-wait", "60") as patient:
            running.signal(signal.SIGTERM)
            running.wait(60).check(143)
            patient.wait(60).check()
        stage.vm._qmp = stage.vm.monitor()
    assert leftovers(stage.vm) == []
    stage.make_good("inc")


@pytest.mark.parametrize("border", BORDERS)
def test_a_dead_run_is_cleaned_up_from_beyond(stage: Scene, elsewhere: Path, border: str) -> None:
    with stage.long_run() as running:
        running.signal(signal.SIGKILL)
        running.wait(60)
    stage.wait_for_rescue()
    backup, *_ = changing(stage.vm.socket, elsewhere / "t")
    with beyond(border, *backup) as second:
        said = second.wait(60).check().err
    assert "Cleaned up after a run that died" in said
    assert leftovers(stage.vm) == []
    stage.make_good("inc")


@pytest.mark.parametrize("border", ["mounts", "processes"])
def test_a_run_beyond_lives_and_dies(stage: Scene, border: str) -> None:
    for block in range(64):
        stage.vm.write("vda", block * 65536, 65536, 3)
    with beyond(border, *stage.arguments("inc", stage.vm.socket), "--speed-limit", "10000") as run:
        stage.vm.qmp.poll(run.unless_over(lambda: is_copying(stage.vm)))
        stage.vm.qmp.close()
        for command in (
            *changing(stage.vm._test_socket, stage.target),
            *looking(stage.vm._test_socket),
        ):
            cli.run(*command).check(LOCKED)
        run.signal(signal.SIGKILL)
        run.wait(60)
        stage.vm._qmp = stage.vm.monitor()
    assert_dead_is_cleaned_up(stage)


def assert_dead_is_cleaned_up(stage: Scene) -> None:
    assert "Cleaned up after a run that died" in stage.run("inc").check().err
    assert_clean(stage.vm, stage.target)
    stage.make_good("inc")


def test_of_two_that_come_at_once_one_goes_on(stage: Scene, elsewhere: Path) -> None:
    stage.vm.qmp.close()
    for number in range(4):
        first = stage.arguments("inc", stage.vm.socket)
        second = changing(stage.vm._test_socket, elsewhere / f"t{number}")[0]
        with ExitStack() as stack:
            runs = [
                stack.enter_context(beyond("mounts", *first)),
                stack.enter_context(beyond("processes", *second)),
            ]
            results = [run.wait(60) for run in runs]
        assert {result.code for result in results} <= {0, LOCKED}, results
        assert any(result.code == 0 for result in results), results
        assert not any("died" in result.err for result in results), results
    stage.vm._qmp = stage.vm.monitor()
    assert leftovers(stage.vm) == []
    stage.make_good("inc")


def test_over_tcp(stage: Scene) -> None:
    address = tcp_monitor(stage)
    for block in range(64):
        stage.vm.write("vda", block * 65536, 65536, 3)
    arguments = ("--socket", address, *stage.arguments("inc", stage.vm.socket)[2:])
    with cli.start(*arguments, "--speed-limit", "10000") as running:
        stage.vm.qmp.poll(running.unless_over(lambda: is_copying(stage.vm)))
        for command in (*changing(stage.vm.socket, stage.target), *looking(stage.vm.socket)):
            with beyond("mounts", *command) as second:
                assert "chardev-remove" in second.wait(60).check(LOCKED).err
        running.signal(signal.SIGKILL)
        running.wait(60)
    assert_dead_is_cleaned_up(stage)


def tcp_monitor(stage: Scene) -> str:
    """The address of the VM's monitor over TCP."""
    names = [device["filename"] for device in stage.vm.qmp("query-chardev")]
    (port,) = (found[1] for name in names if (found := re.search("tcp:.*:([0-9]+),", name)))
    return f"tcp:127.0.0.1:{port}"
