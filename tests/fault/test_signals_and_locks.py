# SPDX-License-Identifier: Apache-2.0
"""Runs that are interrupted or stopped, and runs that meet others at the same VM or target."""

import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean, manifests
from lab.patience import PATIENCE
from lab.proxy import Place, Proxy
from stock.scene import Scene, scene

LOCKED, VM, OFF = 11, 6, 13


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as stage:
        stage.renew("inc")
        yield stage


ENDING = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), ENDING)
def test_a_signal_ends_the_copy_in_order(stage: Scene, number: signal.Signals, code: int) -> None:
    with stage.long_run() as running:
        running.signal(number)
        result = running.wait().check(code)
    assert "Interrupted" in result.err
    assert len(manifests(stage.target)) == 1
    assert_clean(stage.vm, stage.target)
    stage.make_good("inc")


@pytest.mark.usefixtures("ignored")
@pytest.mark.parametrize("number", [number for number, _ in ENDING])
def test_a_signal_that_was_ignored_stays_so(stage: Scene, number: signal.Signals) -> None:
    """As under nohup, or in the background of a script."""
    with stage.long_run() as running:
        running.signal(number)
        running.signal(number)
        stage.vm.quit()
        assert "Interrupted" not in running.wait(60).check(VM).err


@pytest.fixture
def ignored() -> Iterator[None]:
    """What is started ignores the signals that end a run."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number, _ in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_run_leaves_at_once_or_waits(stage: Scene) -> None:
    with stage.long_run() as running:
        arguments = stage.arguments("inc", stage.vm.socket)
        locked = cli.run(*arguments).check(LOCKED)
        assert "--lock-wait" in locked.err
        late = cli.run(*arguments, "--lock-wait", "0.5").check(LOCKED)
        assert late.err == locked.err
        with cli.start(*arguments, "--lock-wait", "600") as patient:
            running.signal(signal.SIGTERM)
            running.wait().check(143)
            patient.wait().check()
    assert len(manifests(stage.target)) == 2
    stage.make_good("inc")


def test_a_vm_with_two_monitors_is_one_vm(stage: Scene) -> None:
    with stage.long_run():
        stage.vm.qmp.close()
        arguments = stage.arguments("inc", stage.vm._test_socket)
        cli.run(*arguments).check(LOCKED)
        stage.vm._qmp = stage.vm.monitor()
    stage.make_good("inc")


def test_a_monitor_that_another_client_holds(stage: Scene) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(stage.vm.socket))
        assert select.select([other], [], [], 30)[0]
        busy = cli.run(*stage.arguments("inc", stage.vm.socket)).check(VM)
    assert "Another client" in busy.err
    assert_clean(stage.vm, stage.target)
    stage.make_good("inc")


def test_nobody_listens(stage: Scene, tmp_path: Path) -> None:
    missing = cli.run(*stage.arguments("inc", tmp_path / "none")).check(OFF)
    assert "no socket" in missing.err
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stage.vm.folder / "dead"))
    refused = cli.run(*stage.arguments("inc", stage.vm.folder / "dead")).check(OFF)
    assert "Nobody listens" in refused.err
    (tmp_path / "file").write_text("")
    refused = cli.run(*stage.arguments("inc", tmp_path / "file")).check(VM)
    assert "is a file, not a socket" in refused.err


def test_looking_at_the_vm_during_a_backup(stage: Scene) -> None:
    commands = (("info", "--show", "blockdev"), ("doctor", "--target", stage.target))
    with stage.long_run() as running, ExitStack() as stack:
        for command in commands:
            cli.run("--socket", stage.vm.socket, *command).check(LOCKED)
        patient = [
            stack.enter_context(
                cli.start("--socket", stage.vm.socket, *command, "--lock-wait", "600")
            )
            for command in commands
        ]
        running.signal(signal.SIGTERM)
        running.wait().check(143)
        for each in patient:
            each.wait().check()


def test_recover_says_what_it_would_do_and_does_just_that(stage: Scene) -> None:
    recover = ("--socket", stage.vm.socket, "recover", "--target", stage.target)
    assert cli.run(*recover, "--dry-run").check().out == "Nothing is left of an earlier run.\n"
    stage.write()
    with stage.long_run() as running:
        running.signal(signal.SIGKILL)
        running.wait()
    stage.wait_for_rescue()
    before = sorted(path for path in stage.target.rglob("*"))
    told = cli.run(*recover, "--dry-run").check().out
    assert "would remove the unfinished point" in told
    assert all(f"{path.parent.name}/{path.name}" in told for path in before if is_partial(path))
    assert "would remove bitmap" in told
    assert sorted(path for path in stage.target.rglob("*")) == before
    cli.run(*recover).check()
    assert_clean(stage.vm, stage.target)
    stage.make_good("inc")


def test_a_first_run_that_was_killed_leaves_a_target_without_points(
    stage: Scene, tmp_path: Path
) -> None:
    stage.target = tmp_path / "new"
    path = stage.vm.folder / "proxy"

    def kill(proxy: Proxy, at: Place) -> None:
        if at.command == "transaction" and not proxy.killed:
            proxy.kill_client()

    with Proxy(path, stage.vm.socket, kill):
        cli.run(*stage.arguments("first", path)).check(-signal.SIGKILL)
        stage.wait_for_rescue()
    assert "no restore point yet" in cli.run("list", "--target", stage.target).check().err
    assert cli.run("list", "--target", stage.target, "--json").check().out == ""
    output = ("--output", tmp_path / "out")
    assert "no restore point" in cli.run("restore", "-t", stage.target, *output).check(10).err
    stage.make_good("first")


def is_partial(path: Path) -> bool:
    return path.name.endswith(".partial")


def test_a_run_that_is_stopped_while_the_vm_stands_still(stage: Scene) -> None:
    """The VM goes on after the watchdog's bound, and the run, once it goes on, makes no point."""
    stage.write()
    path = stage.vm.folder / "proxy"
    pid = 0
    stopped = threading.Event()

    def stop(_proxy: Proxy, at: Place) -> None:
        if at.command == "stop" and at.when == "after":
            os.kill(pid, signal.SIGSTOP)
            stopped.set()

    with Proxy(path, stage.vm.socket, stop), cli.start(*stage.arguments("quiesced", path)) as run:
        pid = run.pid
        assert stopped.wait(PATIENCE)
        assert not stage.vm.qmp("query-status")["running"]
        stage.wait_for_rescue()
        run.signal(signal.SIGCONT)
        result = run.wait()
    assert result.code in {5, VM}, result
    assert "watchdog" in result.err
    assert len(manifests(stage.target)) == 1
    assert_clean(stage.vm, stage.target)
    stage.make_good("inc")


def test_a_vm_that_somebody_stopped_stays_stopped(stage: Scene) -> None:
    stage.vm.qmp("stop")
    stage.write()
    cli.run(*stage.arguments("inc", stage.vm.socket)).check()
    assert stage.vm.qmp("query-status")["status"] == "paused"
    stage.vm.qmp("cont")
    stage.make_good("inc")
