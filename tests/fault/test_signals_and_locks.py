# SPDX-License-Identifier: Apache-2.0
"""Runs that are interrupted or stopped, and runs that meet others at the same VM or target."""

import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean, manifests
from lab.disks import CLUSTER
from lab.proxy import Place, Proxy
from lab.scene import Scene, scene

LOCKED, VM = 11, 6


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path) as stage:
        stage.renew("inc")
        yield stage


@contextmanager
def long_run(stage: Scene, *more: cli.Argument) -> Iterator[cli.Running]:
    """A run that has begun to copy and would go on copying for minutes."""
    for block in range(64):
        stage.vm.write("vda", block * CLUSTER, CLUSTER, 3)
    arguments = stage.arguments("inc", stage.vm.socket)
    with cli.start(*arguments, "--speed-limit", "10000", *more) as running:
        stage.vm.qmp.poll(lambda: copying(stage))
        yield running


def copying(stage: Scene) -> bool:
    jobs = stage.vm.qmp("query-jobs")
    return any(job["type"] == "backup" and job["status"] == "running" for job in jobs)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_copy_in_order(stage: Scene, number: signal.Signals, code: int) -> None:
    with long_run(stage) as running:
        running.signal(number)
        result = running.wait(60).check(code)
    assert "Interrupted" in result.err
    assert len(manifests(stage.target)) == 1
    assert_clean(stage.vm, stage.target)
    stage.make_good("inc")


def test_a_second_run_leaves_at_once_or_waits(stage: Scene) -> None:
    with long_run(stage) as running:
        arguments = stage.arguments("inc", stage.vm.socket)
        locked = cli.run(*arguments, timeout=30).check(LOCKED)
        assert "--lock-wait" in locked.err
        late = cli.run(*arguments, "--lock-wait", "0.5", timeout=30).check(LOCKED)
        assert late.err == locked.err
        with cli.start(*arguments, "--lock-wait", "60") as patient:
            running.signal(signal.SIGTERM)
            running.wait(60).check(143)
            patient.wait(60).check()
    assert len(manifests(stage.target)) == 2
    stage.make_good("inc")


def test_a_vm_with_two_monitors_is_one_vm(stage: Scene) -> None:
    with long_run(stage):
        stage.vm.qmp.close()
        arguments = stage.arguments("inc", stage.vm._test_socket)
        cli.run(*arguments, timeout=30).check(LOCKED)
        stage.vm._qmp = stage.vm.monitor()
    stage.make_good("inc")


def test_a_monitor_that_another_client_holds(stage: Scene) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(stage.vm.socket))
        assert select.select([other], [], [], 30)[0]
        busy = cli.run(*stage.arguments("inc", stage.vm.socket), timeout=60).check(VM)
    assert "Another client" in busy.err
    assert_clean(stage.vm, stage.target)
    stage.make_good("inc")


def test_nobody_listens(stage: Scene, tmp_path: Path) -> None:
    missing = cli.run(*stage.arguments("inc", tmp_path / "none")).check(VM)
    assert "no socket" in missing.err
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stage.vm.folder / "dead"))
    refused = cli.run(*stage.arguments("inc", stage.vm.folder / "dead")).check(VM)
    assert "Nobody listens" in refused.err


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
        assert stopped.wait(30)
        assert not stage.vm.qmp("query-status")["running"]
        stage.wait_for_rescue()
        run.signal(signal.SIGCONT)
        result = run.wait(60)
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
