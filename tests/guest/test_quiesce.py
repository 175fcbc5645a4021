# SPDX-License-Identifier: Apache-2.0
"""Quiesced points of a real guest, and every way in which quiescing fails."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.backups import back_up, leftovers
from lab.cli import Result
from lab.disks import MIB, Disk, create
from lab.guest import Guest

pytestmark = pytest.mark.guest

SIZE = 96 * MIB


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One guest for the tests of this file, with a file system."""
    image = create(tmp_path_factory.mktemp("guest") / "vda", SIZE)
    with Guest([Disk("vda", image)]) as guest:
        guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        yield guest


@pytest.fixture
def guest(shared: Guest) -> Iterator[Guest]:
    """The guest, and the proof that a test has left it thawed, running, and with its agent."""
    yield shared
    assert shared.run("echo alive >/mnt/alive && sync && cat /mnt/alive") == "alive\n"
    assert shared.agent("guest-fsfreeze-status") == "thawed"
    assert leftovers(shared) == []


def quiesce(guest: Guest, target: Path, mode: str = "--quiesce") -> Result:
    """Run a backup with the agent, however it ends."""
    options = ("--socket", guest.socket, "--agent-socket", guest.agent_socket)
    return cli.run(*options, "backup", "--level", "auto", "--target", target, "--json", mode)


def point(result: Result) -> dict[str, Any]:
    """The point that a successful run made."""
    made: dict[str, Any] = result.objects[-1]["point"]
    return made


def restore(target: Path, folder: Path) -> Path:
    """The newest point's disk as a raw image."""
    cli.run("restore", "--target", target, "--output", folder, "--format", "raw").check()
    return folder / "vda.raw"


def needs_recovery(image: Path) -> bool:
    """Whether the journal of the image's file system would have to be replayed."""
    shown = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, text=True, check=True)
    return "needs_recovery" in shown.stdout


def fsck(image: Path, *options: str) -> int:
    """The exit code of a forced check; 0: clean, 1: repaired."""
    command = ["e2fsck", "-f", *options, str(image)]
    return subprocess.run(command, check=False, capture_output=True).returncode


@contextmanager
def slow_freeze(guest: Guest) -> Iterator[Callable[[], None]]:
    """The guest has much to flush and a disk that is too slow for it; yields what ends that."""
    limits = ("bps", "bps_wr", "bps_rd", "iops", "iops_rd", "iops_wr")
    throttle = {"id": guest.qdev("vda"), **dict.fromkeys(limits, 0)}
    guest.run("sync; dd if=/dev/urandom of=/mnt/big bs=1M count=12 2>/dev/null")
    guest.qmp.command("block_set_io_throttle", {**throttle, "bps_wr": 128 * 1024})

    def release() -> None:
        guest.qmp.command("block_set_io_throttle", throttle)

    try:
        yield release
    finally:
        release()


def marked(guest: Guest) -> bool:
    """Whether a run has marked the guest as about to be frozen."""
    return "qmpbackup-frozen" in [item["name"] for item in guest.qmp("qom-list", path="/objects")]


@contextmanager
def agent_with(guest: Guest, option: str) -> Iterator[None]:
    """The guest's agent, started with a further option."""
    command = guest.run("tr '\\0' ' ' </proc/$(pidof qemu-ga)/cmdline")
    restart = "old=$(pidof qemu-ga); kill $old; while [ -e /proc/$old/exe ]; do usleep 10000; done;"
    guest.run(f"{restart} {command} {option}")
    try:
        yield
    finally:
        guest.run(f"{restart} {command}")


def test_quiesced_file_system_needs_no_journal_replay(guest: Guest, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with guest.background("write-records /mnt"):
        for number in range(2):
            made = point(quiesce(guest, target, "--quiesce").check())
            assert made["consistency"] == "agent"
            image = restore(target, tmp_path / f"out{number}")
            assert not needs_recovery(image)
            assert fsck(image, "-n") == 0


def test_unquiesced_file_system_is_repaired_by_its_journal(guest: Guest, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with guest.background("write-records /mnt"):
        made = back_up(guest, target)
    assert made["consistency"] == "crash"
    image = restore(target, tmp_path / "out")
    assert needs_recovery(image)
    assert fsck(image, "-p") in {0, 1}
    assert fsck(image, "-n") == 0


def test_paused_is_what_pausing_makes(guest: Guest, tmp_path: Path) -> None:
    assert back_up(guest, tmp_path / "target", "auto", "--pause")["consistency"] == "paused"


def test_freeze_of_somebody_else_is_respected(guest: Guest, tmp_path: Path) -> None:
    target = tmp_path / "target"
    guest.agent("guest-fsfreeze-freeze")
    try:
        refused = quiesce(guest, target, "--quiesce").check(5)
        assert "already frozen, by somebody else" in refused.err
        tried = quiesce(guest, target, "--quiesce=try").check(3)
        assert point(tried)["consistency"] == "crash"
        assert guest.agent("guest-fsfreeze-status") == "frozen"
    finally:
        guest.agent("guest-fsfreeze-thaw")


def test_agent_without_a_socket(guest: Guest, tmp_path: Path) -> None:
    arguments = ("--target", tmp_path / "t", "--level", "auto")
    without = cli.run("--socket", guest.socket, "backup", "--quiesce", *arguments)
    assert without.code in {2, 5}
    wrong = ("--agent-socket", guest.folder / "none", "backup", *arguments)
    missing = cli.run("--socket", guest.socket, *wrong, "--quiesce").check(5)
    assert "There is no socket" in missing.err
    assert not list((tmp_path / "t").glob("points/*"))


def test_agent_that_does_not_answer(guest: Guest, tmp_path: Path) -> None:
    guest.run("kill -STOP $(pidof qemu-ga)")
    try:
        refused = quiesce(guest, tmp_path / "target", "--quiesce").check(5)
    finally:
        guest.run("kill -CONT $(pidof qemu-ga)")
    assert "does not answer" in refused.err
    assert "qemu-guest-agent runs in the guest" in refused.err


def test_agent_that_may_not_freeze(guest: Guest, tmp_path: Path) -> None:
    with agent_with(guest, "-b guest-fsfreeze-freeze"):
        refused = quiesce(guest, tmp_path / "target", "--quiesce").check(5)
    assert "block-rpcs" in refused.err


def test_guest_without_file_systems_to_freeze(guest: Guest, tmp_path: Path) -> None:
    guest.run("umount /mnt")
    try:
        refused = quiesce(guest, tmp_path / "target", "--quiesce").check(5)
        assert "froze no file system" in refused.err
        tried = quiesce(guest, tmp_path / "target", "--quiesce=try").check(3)
        assert point(tried)["consistency"] == "crash"
    finally:
        guest.run("mount /dev/vda /mnt")


def test_run_killed_while_the_guest_freezes(guest: Guest, tmp_path: Path) -> None:
    target = tmp_path / "target"
    options = ("--socket", guest.socket, "--agent-socket", guest.agent_socket)
    arguments = ("backup", "--level", "auto", "--quiesce", "--target", target)
    with slow_freeze(guest), cli.start(*options, *arguments) as running:
        guest.qmp.poll(lambda: marked(guest))
    guest.run("echo thawed >/mnt/thawed && sync")
    assert guest.agent("guest-fsfreeze-status") == "thawed"
    result = quiesce(guest, target, "--quiesce").check()
    assert point(result)["consistency"] == "agent"
    assert not marked(guest)
    assert running.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_interrupted_while_the_guest_freezes(
    guest: Guest, tmp_path: Path, number: signal.Signals
) -> None:
    options = ("--socket", guest.socket, "--agent-socket", guest.agent_socket)
    arguments = ("backup", "--level", "auto", "--quiesce", "--target", tmp_path / "target")
    with slow_freeze(guest) as release, cli.start(*options, *arguments) as running:
        guest.qmp.poll(lambda: marked(guest))
        running.signal(number)
        release()
        running.wait().check(128 + number)
    assert not marked(guest)
