# SPDX-License-Identifier: Apache-2.0
"""Reading views where something goes wrong: an error, never wrong bytes, and nothing for the guest."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.backups import leftovers
from lab.disks import MIB, Disk, create, first_difference, pattern
from lab.ports import free_port
from lab.qemu import Qemu, StartQemu
from lab.small import small_folder
from qmpbackup import interrupt
from qmpbackup.errors import ConnectionLost, Interrupted, JobError, StorageError
from qmpbackup.machine.pull import Method
from qmpbackup.nbd.reader import Flow
from stock.pulling import CHUNK, Puller, collect

SIZE = 20 * MIB

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


def one_disk(start_qemu: StartQemu, folder: Path, **options: object) -> Qemu:
    """A VM with one disk full of data."""
    image = create(folder / "a", SIZE, contents=pattern(SIZE, 1))
    return start_qemu([Disk("vda", image)], **options)


@contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """End what would never end by itself."""

    def end(*_: object) -> None:
        raise TimeoutError(f"not over after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@needs_root
def test_a_full_scratch_fails_the_run_and_not_the_guest(
    start_qemu: StartQemu, tmp_path: Path
) -> None:
    vm = one_disk(start_qemu, tmp_path)
    with small_folder(tmp_path / "small", 4 * MIB) as folder:
        with Puller(vm, folder) as run:
            run.take()
            vm.write("vda", 0, SIZE, 9)
            with pytest.raises(JobError, match="--scratch"):
                run.read()
                run.pull.finish()
        assert run.complaints == []
    assert leftovers(vm) == []
    assert vm.qmp("query-status")["running"]
    assert vm.contents("vda") == b"\x09" * SIZE


@needs_root
def test_a_scratch_that_fills_up_after_the_last_chunk_is_noticed(
    start_qemu: StartQemu, tmp_path: Path
) -> None:
    """What was read may be right, but nobody can tell any more."""
    vm = one_disk(start_qemu, tmp_path)
    with (
        small_folder(tmp_path / "small", 4 * MIB) as folder,
        Puller(vm, folder, way=Method.V2) as run,
    ):
        run.take()
        run.read()
        run.pull.finish()
        vm.write("vda", 0, SIZE, 9)
        with pytest.raises(JobError):
            run.pull.finish()


@needs_root
def test_a_full_stage_fails_the_run(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = one_disk(start_qemu, tmp_path)
    with small_folder(tmp_path / "small", 4 * MIB) as folder:
        run = Puller(vm, folder, way=Method.STAGED)
        with run, pytest.raises(StorageError):
            run.take()
        assert run.complaints == []
    assert leftovers(vm) == []


def test_nothing_to_read_is_no_fault(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = one_disk(start_qemu, tmp_path)
    with Puller(vm, tmp_path) as first:
        first.take()
    with Puller(vm, tmp_path, first.bitmaps) as run:
        run.take()
        vm.write("vda", 0, SIZE, 9)
        found = run.read()
        run.pull.finish()
    assert found["vda"].wanted == []
    assert found["vda"].chunks == {}
    assert run.complaints == []


@pytest.mark.parametrize("speed", [0, 1])
def test_a_qemu_that_dies_ends_the_reading(
    speed: int, start_qemu: StartQemu, tmp_path: Path
) -> None:
    """Also where a limit would have let the next request go only in days."""
    vm = one_disk(start_qemu, tmp_path)
    with Puller(vm, tmp_path) as run, bounded(60):
        run.take()
        with pytest.raises(ConnectionLost):
            run.read(Flow(requests=1, buffers=1, speed=lambda: speed), after_each=vm.kill)


def test_a_signal_ends_the_reading(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = one_disk(start_qemu, tmp_path)
    with interrupt.held(), Puller(vm, tmp_path) as run:
        run.take()
        with pytest.raises(Interrupted):
            run.read(
                Flow(requests=1, buffers=1), after_each=lambda: signal.raise_signal(signal.SIGTERM)
            )
    assert run.complaints == []
    assert leftovers(vm) == []


def test_a_qemu_of_another_user_needs_no_right_on_our_files(
    start_qemu: StartQemu, tmp_path: Path, open_folder: Path
) -> None:
    image = create(open_folder / "a", SIZE, contents=pattern(SIZE, 2))
    image.chmod(0o666)
    vm = start_qemu([Disk("vda", image)], user="nobody")
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    base = vm.contents("vda")
    with Puller(vm, private) as run:
        run.take()
        vm.write("vda", 0, SIZE, 9)
        found = run.read()
        run.pull.finish()
    assert run.complaints == []
    assert not first_difference(found["vda"].over(bytes(SIZE)), base)
    assert leftovers(vm) == []


def test_over_tcp_qemu_opens_socket_and_files_itself(start_qemu: StartQemu, tmp_path: Path) -> None:
    address = f"tcp:127.0.0.1:{free_port()}"
    vm = one_disk(start_qemu, tmp_path, args=("-qmp", f"{address},server=on,wait=off"))
    base = vm.contents("vda")
    with Puller(vm, tmp_path, socket=address) as run:
        run.take(samples={0: [1]})
        vm.write("vda", 0, SIZE, 9)
        found = run.read()
        run.pull.finish()
    assert run.complaints == []
    assert not first_difference(found["vda"].over(bytes(SIZE)), base)
    assert leftovers(vm) == []
    assert not list(tmp_path.glob(".qmpbackup-*"))


def test_several_disks_are_open_at_once(start_qemu: StartQemu, tmp_path: Path) -> None:
    """A disk that is read no further hinders nobody."""
    images = [create(tmp_path / name, SIZE, contents=pattern(SIZE, 3)) for name in "ab"]
    vm = start_qemu([Disk("vda", images[0]), Disk("vdb", images[1])])
    base = vm.contents("vdb")
    with Puller(vm, tmp_path) as run:
        run.take()
        one, two = run.seats
        with run.pull.open(one) as idle, run.pull.open(two) as disk:
            chunk = next(idle.chunks())
            found = collect(disk, CHUNK)
            chunk.release()
    assert run.complaints == []
    assert not first_difference(found.over(bytes(SIZE)), base)
