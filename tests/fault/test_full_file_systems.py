# SPDX-License-Identifier: Apache-2.0
"""File systems with too little room for the guest's thin image and for what a run takes there: the run
is refused or given up, and the guest, which is the judge, never notices, or runs again.

The guest's image lies on a small ext4 of its own. What a guest writes it may wait for, so a command in it
that succeeds says that no write was lost; how long that took does not matter here.
"""

import ctypes
import fcntl
import os
import re
import signal
import termios
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up, is_copying, leftovers, try_backup
from lab.disks import CLUSTER, MIB, Disk, create
from lab.guest import Guest
from lab.qemu import Qemu
from lab.repositories import Target, environment_of
from lab.small import fill_up_to, free, needs_root, small_disk
from stock.repositories import repository
from stock.scene import WHERE, Where

STORAGE, DAMAGED = 7, 8

PIDFD_GETFD = 438
"""The number of pidfd_getfd(2), on all machines."""

pytestmark = needs_root

REWRITE = "dd if=/dev/urandom of=/dev/vda bs=1M count=100 oflag=direct conv=notrunc 2>&1"
"""Writes what the guest has already: with a view, old contents go to the scratch."""

GROW = "dd if=/dev/urandom of=/dev/vda bs=1M seek=150 count=20 oflag=direct conv=notrunc 2>&1"
"""Needs new room for the image, which is there without a backup."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the images lie."""
    with small_disk(tmp_path / "small", 300 * MIB) as mounted:
        yield mounted


@contextmanager
def booted(folder: Path, iothread: str = "") -> Iterator[Guest]:
    """A guest whose disk has 120 MiB of data, thin."""
    disk = Disk("vda", create(folder / "vda.qcow2", 400 * MIB), iothread=iothread)
    with Guest([disk], iothreads=[iothread] if iothread else [], patience=180) as guest:
        guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=120 oflag=direct 2>&1")
        yield guest


def target_in(folder: Path, where: Where) -> Target:
    return repository(folder / "repository") if where == "repository" else folder / "target"


@contextmanager
def slow_run(vm: Qemu, target: Target, *more: cli.Argument) -> Iterator[cli.Running]:
    """A run that has a view, and would go on copying for minutes."""
    arguments = ("--level", "full", "--target", str(target), "--speed-limit", "256K", *more)
    command = ("--socket", vm.socket, "backup", *arguments)
    with cli.start(*command, env=environment_of(target)) as running:
        wait_for_view(vm, running)
        yield running


def wait_for_view(vm: Qemu, running: cli.Running) -> None:
    def is_there() -> bool:
        assert running.process.poll() is None, running.wait()
        # Not query-named-block-nodes: QEMU 7.2 aborts if it comes just as a qcow2 node is being opened.
        shown = any(export["shutting-down"] is False for export in vm.qmp("query-block-exports"))
        return vm.qmp("query-status")["running"] and (is_copying(vm) or shown)

    vm.qmp.poll(is_there, 120)


def status(vm: Qemu) -> str:
    return str(vm.qmp("query-status")["status"])


def stop_at_rest(running: cli.Running) -> None:
    """Stop a run while it asks QEMU for nothing: QEMU's own stop waits until an answer is taken."""
    while True:
        running.signal(signal.SIGSTOP)
        time.sleep(0.5)  # for answers that are under way; a run that is slow rests nearly always
        if not unread(running.pid):
            return
        running.signal(signal.SIGCONT)
        time.sleep(0.2)


def unread(pid: int) -> int:
    """Bytes in the sockets of a process that it has not read."""
    found, process = 0, os.pidfd_open(pid)
    try:
        for each in Path(f"/proc/{pid}/fd").iterdir():
            if not str(each.readlink()).startswith("socket:"):
                continue
            copy = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, int(each.name), 0)
            count = array("i", [0])
            with suppress(OSError):  # one that listens
                fcntl.ioctl(copy, termios.FIONREAD, count)
            os.close(copy)
            found += count[0]
    finally:
        os.close(process)
    return found


def starve(guest: Guest, folder: Path) -> None:
    """Have the guest find no room: it rewrites, and then needs more, in the background."""
    guest.run(f"({REWRITE}; {GROW}; touch /run/done) >/run/starving 2>&1 &")
    guest.qmp.poll(lambda: status(guest) == "io-error", 120)
    assert free(folder) < MIB


def recovers(guest: Guest) -> None:
    """The guest's writes come through."""
    guest.run("until [ -e /run/done ]; do usleep 20000; done")
    said = guest.run("cat /run/starving")
    assert "rror" not in said, said
    assert status(guest) == "running"


class TestRefused:
    """What cannot fit is not begun, and doctor says so before."""

    @pytest.mark.parametrize("level", ["full", "auto"])
    def test_a_folder_beside_the_images(self, folder: Path, level: str) -> None:
        image = create(folder / "a", 400 * MIB)
        with Qemu([Disk("vda", image)]) as vm:
            vm.write("vda", 0, 160 * MIB, 1)
            before = free(folder)
            doctor = cli.run("--socket", vm.socket, "doctor", "--target", folder / "target")
            assert "too little room" in doctor.check(1).out
            refused = try_backup(vm, folder / "target", level).check(STORAGE)
            # The data, some metadata of the image, and 4 MiB with which a scratch begins.
            assert re.search(
                r"16[4-6]\.\d MiB are needed \(scratch, the backup of vda\)", refused.err
            )
            assert "nothing was changed" in refused.err
            assert not (folder / "target").exists()
            assert free(folder) >= before - MIB
            assert leftovers(vm) == []

    def test_a_copy_that_is_made_beside_the_images_first(
        self, folder: Path, tmp_path: Path
    ) -> None:
        disk = Disk("vda", create(folder / "a", 400 * MIB), iothread="thread")
        target = repository(tmp_path / "repository")
        with Qemu([disk], iothreads=["thread"]) as vm:
            if vm.qmp.version >= (9, 0, 0):
                pytest.skip("this QEMU is read directly")
            vm.write("vda", 0, 160 * MIB, 1)
            assert "too little room" in try_backup(vm, target, "full").check(STORAGE).err
            assert leftovers(vm) == []
            # Elsewhere there is room.
            back_up(vm, target, "full", "--scratch", tmp_path)

    def test_an_incremental_by_what_has_changed(self, folder: Path) -> None:
        with Qemu([Disk("vda", create(folder / "a", 400 * MIB))]) as vm:
            vm.write("vda", 0, 64 * MIB, 1)
            back_up(vm, folder / "target")
            vm.write("vda", 0, 64 * MIB, 2)
            fill_up_to(folder, 40 * MIB)
            assert "68.0 MiB are needed" in try_backup(vm, folder / "target").check(STORAGE).err
            vm.write("vda", 0, CLUSTER, 3)
            assert_clean(vm, folder / "target")

    @pytest.mark.parametrize("where", WHERE)
    def test_a_host_that_is_95_percent_full_is_backed_up(
        self, folder: Path, tmp_path: Path, where: Where
    ) -> None:
        """Its disks could grow by a hundred times what is free."""
        with Qemu([Disk("vda", create(folder / "a", 2000 * MIB))]) as vm:
            vm.write("vda", 0, 16 * MIB, 1)
            fill_up_to(folder, 14 * MIB)
            target = target_in(tmp_path, where)
            point = back_up(vm, target)
            vm.write("vda", 0, CLUSTER, 2)
            point = back_up(vm, target, "inc")
            assert_restores(target, point["id"], {"vda": vm.contents("vda")}, tmp_path)

    def test_room_that_is_only_reserved_in_an_image_is_not_counted(self, folder: Path) -> None:
        image = create(folder / "a", 200 * MIB, "raw", options="preallocation=falloc")
        with Qemu([Disk("vda", image, "raw")]) as vm:
            vm.write("vda", 0, 4 * MIB, 1)
            back_up(vm, folder / "target")

    def test_without_a_reserve_nothing_is_refused(self, folder: Path) -> None:
        with Qemu([Disk("vda", create(folder / "a", 400 * MIB))]) as vm:
            vm.write("vda", 0, 160 * MIB, 1)
            failed = try_backup(vm, folder / "target", "full", "--reserve", "0").check(STORAGE)
            assert "No space left" in failed.err
            assert_clean(vm, folder / "target")
            assert free(folder) > 90 * MIB


@pytest.mark.guest
class TestGivenUp:
    """What has begun ends before the reserve is touched, whoever fills the file system."""

    @pytest.mark.parametrize("where", WHERE)
    @pytest.mark.parametrize("iothread", ["", "thread"])
    def test_a_scratch_beside_the_image(
        self, folder: Path, tmp_path: Path, where: Where, iothread: str
    ) -> None:
        with booted(folder, iothread) as guest:
            target = target_in(tmp_path, where)
            before = free(folder)
            with slow_run(guest, target) as running:
                fill_up_to(folder, 90 * MIB)
                guest.run(REWRITE)
                guest.run(GROW)
                failed = running.wait().check(STORAGE)
            assert "are kept for the images of running VMs" in failed.err
            assert status(guest) == "running"
            assert leftovers(guest) == []
            (folder / "filler").unlink()
            assert free(folder) > before - 30 * MIB
            back_up(guest, target, "auto", "--scratch", tmp_path)

    @pytest.mark.parametrize("where", WHERE)
    def test_somebody_else_fills_it(self, folder: Path, tmp_path: Path, where: Where) -> None:
        with booted(folder) as guest:
            beside = folder if where == "directory" else tmp_path
            target = target_in(beside, where)
            with slow_run(guest, target, "--reserve", "20M") as running:
                filler = fill_up_to(folder, 15 * MIB)
                assert "Given up" in running.wait().check(STORAGE).err
            filler.unlink()
            guest.run(GROW)
            assert status(guest) == "running"
            assert leftovers(guest) == []


@pytest.mark.guest
class TestRunsAgain:
    """A VM that stopped over our room runs again. Nobody looks at the room here, so that it can."""

    @pytest.mark.parametrize("where", WHERE)
    def test_by_the_run_itself(self, folder: Path, tmp_path: Path, where: Where) -> None:
        with booted(folder) as guest:
            target = target_in(tmp_path, where)
            fill_up_to(folder, 60 * MIB)
            with slow_run(guest, target, "--reserve", "0") as running:
                stop_at_rest(running)
                starve(guest, folder)
                running.signal(signal.SIGCONT)
                failed = running.wait().check(STORAGE)
            assert "found no room" in failed.err
            assert "runs again" in failed.err
            recovers(guest)
            assert leftovers(guest) == []

    @pytest.mark.parametrize("where", WHERE)
    def test_by_recover_where_the_run_was_killed(
        self, folder: Path, tmp_path: Path, where: Where
    ) -> None:
        with booted(folder) as guest:
            target = target_in(tmp_path, where)
            fill_up_to(folder, 60 * MIB)
            with slow_run(guest, target, "--reserve", "0") as running:
                # Before its view breaks: it would end then, and let the VM run.
                running.signal(signal.SIGKILL)
                running.wait()
            starve(guest, folder)
            doctor = cli.run("--socket", guest.socket, "doctor").check(1)
            assert "found no room" in doctor.out
            assert "qmpbackup recover" in doctor.out
            planned = cli.run("--socket", guest.socket, "recover", "--dry-run").check()
            assert "would let the VM run again" in planned.out
            assert status(guest) == "io-error"
            done = cli.run("--socket", guest.socket, "recover").check()
            assert "let the VM run again" in done.out
            recovers(guest)
            assert leftovers(guest) == []
            cli.run("--socket", guest.socket, "doctor").check()

    def test_only_where_there_is_room(self, folder: Path) -> None:
        """A recovery that finds none says so, and the next one makes good."""
        with booted(folder) as guest:
            filler = fill_up_to(folder, MIB)
            guest.run(f"({GROW}; touch /run/done) >/run/starving 2>&1 &")
            guest.qmp.poll(lambda: status(guest) == "io-error", 120)
            # What a run leaves that was killed after it had marked the VM.
            mark = f"qmpbackup-ran-{folder.stat().st_dev:x}"
            guest.qmp("object-add", qom_type="throttle-group", id=mark)
            failed = cli.run("--socket", guest.socket, "recover").check(STORAGE)
            assert "found no room" in failed.err
            assert status(guest) == "io-error"
            filler.unlink()
            cli.run("--socket", guest.socket, "recover").check()
            recovers(guest)
            assert leftovers(guest) == []

    def test_not_over_room_elsewhere(self, folder: Path) -> None:
        """The run that died had taken room on another file system than the image's."""
        with booted(folder) as guest:
            filler = fill_up_to(folder, MIB)
            guest.run(f"({GROW}; touch /run/done) >/run/starving 2>&1 &")
            guest.qmp.poll(lambda: status(guest) == "io-error", 120)
            mark = f"qmpbackup-ran-{folder.stat().st_dev + 1:x}"
            guest.qmp("object-add", qom_type="throttle-group", id=mark)
            filler.unlink()
            cli.run("--socket", guest.socket, "recover").check()
            assert leftovers(guest) == []
            assert status(guest) == "io-error"
            guest.qmp("cont")
            recovers(guest)

    def test_a_vm_that_somebody_else_stopped_stays_so(self, folder: Path, tmp_path: Path) -> None:
        with booted(folder) as guest:
            with slow_run(guest, tmp_path / "target", "--reserve", "20M") as running:
                guest.qmp("stop")
                fill_up_to(folder, 15 * MIB)
                running.wait().check(STORAGE)
            assert status(guest) == "paused"
            guest.qmp("cont")

    def test_a_vm_that_had_stopped_before_stays_so(self, folder: Path, tmp_path: Path) -> None:
        with booted(folder) as guest:
            filler = fill_up_to(folder, MIB)
            guest.run(f"({GROW}; touch /run/done) >/run/starving 2>&1 &")
            guest.qmp.poll(lambda: status(guest) == "io-error", 120)
            filler.unlink()
            back_up(guest, tmp_path / "target")
            assert status(guest) == "io-error"
            doctor = cli.run("--socket", guest.socket, "doctor").check(1)
            assert "found no room" in doctor.out
            guest.qmp("cont")
            recovers(guest)


class TestRestore:
    """A restore beside running VMs."""

    @pytest.fixture(params=WHERE)
    def point(self, request: pytest.FixtureRequest, tmp_path: Path) -> Target:
        target = target_in(tmp_path, request.param)
        image = create(tmp_path / "a", 128 * MIB, contents=os.urandom(128 * MIB))
        with Qemu([Disk("vda", image)]) as vm:
            back_up(vm, target)
        return target

    def test_what_does_not_fit_is_not_begun(self, folder: Path, point: Target) -> None:
        fill_up_to(folder, 100 * MIB)
        output = folder / "restored"
        refused = restore(point, output).check(STORAGE)
        assert "too little room" in refused.err
        assert not output.exists()

    def test_what_no_longer_fits_is_given_up(self, folder: Path, point: Target) -> None:
        output = folder / "restored"
        # What is left would hold nearly all of it: the reserve is missed long before the room is.
        with started(point, output, "--reserve", "120M") as running:
            deadline = time.monotonic() + 60
            while not list(output.glob("*.partial")):
                assert time.monotonic() < deadline
                assert running.process.poll() is None, running.wait()
            running.signal(signal.SIGSTOP)
            try:
                if not list(output.glob("*.partial")):
                    pytest.skip("the restore was over before it could be stopped")
                filler = fill_up_to(folder, 110 * MIB)
            finally:
                running.signal(signal.SIGCONT)
            assert "Given up" in running.wait().check(STORAGE).err
        filler.unlink()
        assert free(folder) > 200 * MIB
        assert not output.exists()
        restore(point, output).check()


def restore(target: Target, output: Path, *more: cli.Argument) -> cli.Result:
    with started(target, output, *more) as running:
        return running.wait()


def started(target: Target, output: Path, *more: cli.Argument) -> cli.Running:
    arguments: Sequence[cli.Argument] = ("--target", str(target), "--output", output, *more)
    return cli.start("restore", *arguments, env=environment_of(target))
