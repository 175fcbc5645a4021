# SPDX-License-Identifier: Apache-2.0
"""A VM runs again whatever becomes of the run that has stopped it."""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab.patience import PATIENCE
from lab.qemu import Qemu, StartQemu
from stock.doomed import DoomedRun

MARKER = {"qom-type": "throttle-group", "id": "qmpbackup-stopped"}


@pytest.fixture
def vm(start_qemu: StartQemu) -> Qemu:
    return start_qemu(machine="none")


@pytest.fixture
def run(vm: Qemu) -> Iterator[DoomedRun]:
    with DoomedRun(vm.socket) as doomed:
        yield doomed


def stop(run: DoomedRun) -> None:
    """As the product does it."""
    assert run("arm_stop", 2 * PATIENCE) is None
    run("qmp", "object-add", MARKER)
    run("qmp", "stop")


def status(vm: Qemu) -> str:
    return str(vm.qmp("query-status")["status"])


def wait_until_running(vm: Qemu) -> None:
    vm.qmp.poll(lambda: status(vm) == "running")


def marked(vm: Qemu) -> bool:
    return "qmpbackup-stopped" in [item["name"] for item in vm.qmp("qom-list", path="/objects")]


def ended(watchdog: int, timeout: float = PATIENCE) -> bool:
    """Whether the process behind a pidfd ends in time."""
    poll = select.poll()
    poll.register(watchdog, select.POLLIN)
    return bool(poll.poll(1000 * timeout))


def test_vm_runs_after_the_run_was_killed(vm: Qemu, run: DoomedRun) -> None:
    stop(run)
    assert status(vm) == "paused"
    run.kill()
    wait_until_running(vm)
    assert ended(run.watchdog)
    assert not marked(vm)
    with DoomedRun(vm.socket) as next_run:
        assert next_run("qmp", "query-status")["status"] == "running"


@pytest.mark.parametrize(
    "half",
    [
        '{"execute":"qom-list","arguments":{"pa',
        '{"execute":"object-del","arguments":{"id":"a\\',
        '{"execute":"object-del","arguments":{"id":-1',
        '{"execute":"object-del","arguments":{"id":tru',
        '[[[{"a":[{"b":"\\u00',
        '{"execute":"transaction","arguments":{"actions":[],"id":"é',
    ],
)
def test_a_command_the_run_had_half_written_does_not_hinder(
    vm: Qemu, run: DoomedRun, half: str
) -> None:
    stop(run)
    run("raw", "qmp", half)
    run.kill()
    wait_until_running(vm)


def test_answers_the_run_had_not_read_do_not_hinder(vm: Qemu, run: DoomedRun) -> None:
    stop(run)
    run("raw", "qmp", '{"execute":"query-qmp-schema"}' * 8)
    run.kill()
    wait_until_running(vm)
    assert ended(run.watchdog)
    assert not marked(vm)


def test_vm_runs_at_the_time_limit_while_the_run_is_stopped(vm: Qemu, run: DoomedRun) -> None:
    stop(run)
    assert run("arm_stop", 0.3) is None
    run.signal(signal.SIGSTOP)
    wait_until_running(vm)
    run.signal(signal.SIGCONT)
    # The run's own connection is still good, stray answers and all, and it learns what happened.
    assert run("qmp", "cont") == {}
    assert run("qmp", "object-del", {"id": "qmpbackup-stopped"}) == {}
    assert run("disarm_stop").startswith("VmError: The watchdog had to step in")
    assert run("arm_stop", 10).startswith("VmError")


def test_a_run_that_is_killed_while_stopped_leaves_nothing(vm: Qemu, run: DoomedRun) -> None:
    stop(run)
    assert run("arm_stop", 0.3) is None
    run.signal(signal.SIGSTOP)
    wait_until_running(vm)
    assert marked(vm)
    run.kill()
    assert ended(run.watchdog)
    assert not marked(vm)


def test_vm_that_is_stopped_after_the_time_limit_runs_when_the_run_dies(
    vm: Qemu, run: DoomedRun
) -> None:
    run("arm_stop", 0.0)
    run("qmp", "object-add", MARKER)
    assert run("arm_stop", 0.0).startswith("VmError")
    run("qmp", "stop")
    run.kill()
    wait_until_running(vm)


def test_run_that_gives_up_gets_its_vm_back(vm: Qemu, run: DoomedRun) -> None:
    stop(run)
    assert run("close") is None
    assert status(vm) == "running"
    assert not marked(vm)
    assert ended(run.watchdog)
    assert run("qmp", "query-status")["status"] == "running"


def test_vm_that_somebody_else_stopped_stays_stopped(vm: Qemu, run: DoomedRun) -> None:
    stop(run)
    run("qmp", "cont")
    assert run("disarm_stop") is None
    vm.qmp("stop")
    run.kill()
    assert ended(run.watchdog)
    assert status(vm) == "paused"


def test_closing_ends_the_process(run: DoomedRun) -> None:
    assert run("arm_stop", 2 * PATIENCE) is None
    assert run("disarm_stop") is None
    assert run("close") is None
    assert ended(run.watchdog, 0)
    assert not Path(f"/proc/{run.watchdog_pid}").exists(), "a zombie is left"


def test_vm_runs_once_a_hanging_qemu_is_back(vm: Qemu, run: DoomedRun) -> None:
    stop(run)
    os.kill(vm.pid, signal.SIGSTOP)
    run.kill()
    os.kill(vm.pid, signal.SIGCONT)
    wait_until_running(vm)


def test_watchdog_ends_when_the_vm_dies(vm: Qemu, run: DoomedRun) -> None:
    stop(run)
    vm.kill()
    run.kill()
    assert ended(run.watchdog)


def test_run_learns_that_the_watchdog_was_killed(run: DoomedRun) -> None:
    assert run("arm_stop", 2 * PATIENCE) is None
    signal.pidfd_send_signal(run.watchdog, signal.SIGKILL)
    assert ended(run.watchdog)
    assert run("disarm_stop").startswith("VmError: The watchdog process was killed")
    assert run("arm_stop", 2 * PATIENCE).startswith("VmError: The watchdog process was killed")
    assert run("arm_freeze", 2 * PATIENCE).startswith(
        "QuiesceError: The watchdog process was killed"
    )
    assert run("close") is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE])
def test_signals_that_end_a_run_do_not_end_the_watchdog(
    vm: Qemu, run: DoomedRun, number: signal.Signals
) -> None:
    stop(run)
    signal.pidfd_send_signal(run.watchdog, number)
    run.kill()
    wait_until_running(vm)


def test_watchdog_keeps_nothing_of_the_run_but_its_connections(run: DoomedRun) -> None:
    process = Path(f"/proc/{run.watchdog_pid}")
    assert run("arm_stop", 2 * PATIENCE) is None
    kept = []
    for entry in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            kept.append(str(entry.readlink()).partition(":")[0])
    assert kept == ["socket", "socket"]
    assert (process / "cwd").readlink() == Path("/")
    assert os.getsid(run.watchdog_pid) == run.watchdog_pid
