# SPDX-License-Identifier: Apache-2.0
"""A real guest is thawed and runs again, whatever becomes of the run that has frozen it."""

import signal
from collections.abc import Iterator

import pytest

from lab.disks import MIB, Disk, create
from lab.guest import Guest
from stock.doomed import DoomedRun

pytestmark = pytest.mark.guest

MARKER = {"qom-type": "throttle-group", "id": "qmpbackup-stopped"}


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One guest for the tests of this file, with a file system."""
    image = create(tmp_path_factory.mktemp("guest") / "vda", 64 * MIB)
    with Guest([Disk("vda", image)]) as guest:
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        yield guest


@pytest.fixture
def run(guest: Guest) -> Iterator[DoomedRun]:
    with DoomedRun(guest.socket, guest.agent_socket) as doomed:
        yield doomed


def freeze(run: DoomedRun, seconds: float = 30) -> None:
    """As the product does it."""
    assert run("arm_freeze", seconds) is None
    assert run("agent", "freeze", 30) == 1


def stop(run: DoomedRun) -> None:
    """As the product does it."""
    assert run("arm_stop", 30) is None
    run("qmp", "object-add", MARKER)
    run("qmp", "stop")


def writes(guest: Guest) -> bool:
    """Whether the guest can write; waits for a thaw, and fails where none comes."""
    return guest.run("echo alive >/mnt/alive && sync && cat /mnt/alive") == "alive\n"


def test_thawed_after_the_run_was_killed(guest: Guest, run: DoomedRun) -> None:
    freeze(run)
    run.kill()
    assert writes(guest)
    assert guest.agent("guest-fsfreeze-status") == "thawed"


def test_thawed_and_running_after_the_run_was_killed(guest: Guest, run: DoomedRun) -> None:
    freeze(run)
    stop(run)
    run.kill()
    assert writes(guest)
    assert guest.qmp("query-status")["status"] == "running"


def test_thawed_and_running_at_the_time_limit_while_the_run_is_stopped(
    guest: Guest, run: DoomedRun
) -> None:
    freeze(run, 0.5)
    stop(run)
    run.signal(signal.SIGSTOP)
    assert writes(guest)
    run.signal(signal.SIGCONT)
    assert run("disarm_stop").startswith("VmError: The watchdog had to step in")
    assert run("agent", "thaw") == 0
    assert run("qmp", "object-del", {"id": MARKER["id"]}) == {}


def test_half_a_command_to_the_agent_does_not_hinder(guest: Guest, run: DoomedRun) -> None:
    freeze(run)
    run("raw", "agent", '{"execute": "guest-fsfreeze-th')
    run.kill()
    assert writes(guest)


def test_a_freeze_that_comes_later_is_undone(guest: Guest, run: DoomedRun) -> None:
    guest.run("kill -STOP $(pidof qemu-ga)")
    assert run("arm_freeze", 30) is None
    assert run("agent", "freeze", 0.5, 0.5).startswith("GuestStateUnknown")
    run.kill()
    guest.run("kill -CONT $(pidof qemu-ga)")
    # The agent now freezes, and then finds our thaw.
    guest.wait_for_agent()
    assert guest.agent("guest-fsfreeze-status") == "thawed"
    assert writes(guest)


def test_thawed_when_the_agent_died_and_came_back(guest: Guest, run: DoomedRun) -> None:
    command = guest.run("tr '\\0' ' ' </proc/$(pidof qemu-ga)/cmdline")
    freeze(run)
    guest.run("kill -9 $(pidof qemu-ga)")
    run.kill()
    guest.run(command)
    assert writes(guest)
