# SPDX-License-Identifier: Apache-2.0
"""The laboratory itself: a test is worth what its equipment is worth."""

import os
from pathlib import Path

import pytest

from lab.disks import CLUSTER, MIB, Disk, contents, create, first_difference, pattern
from lab.load import Write, Writer, instants
from lab.qemu import Qemu, StartQemu

SIZE = 4 * MIB


def test_contents_of_a_live_disk_are_what_was_written(
    start_qemu: StartQemu, tmp_path: Path
) -> None:
    original = pattern(SIZE, seed=1)
    disk = Disk("vda", create(tmp_path / "a.qcow2", SIZE, contents=original))
    vm = start_qemu([disk])
    vm.write("vda", CLUSTER, CLUSTER, 7)
    expected = original[:CLUSTER] + b"\x07" * CLUSTER + original[2 * CLUSTER :]
    assert first_difference(vm.contents("vda"), expected) == ""


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi", "ide", "nvme", "usb", "floppy"])
def test_every_bus_takes_writes(bus: str, start_qemu: StartQemu, tmp_path: Path) -> None:
    size = 1440 * 1024
    image = create(tmp_path / "a.raw", size, "raw")
    vm = start_qemu([Disk("d", image, "raw", bus=bus)])  # type: ignore[arg-type]
    vm.write("d", 0, 512, 9)
    assert first_difference(vm.contents("d"), b"\x09" * 512 + bytes(size - 512)) == ""


def test_contents_are_found_below_filters(start_qemu: StartQemu, tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", SIZE)
    vm = start_qemu([Disk("vda", image, filters=("throttle", "copy-on-read"))])
    vm.write("vda", 0, SIZE, 3)
    assert first_difference(vm.contents("vda"), b"\x03" * SIZE) == ""


def test_a_failed_write_fails_the_test(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE))])
    with pytest.raises(AssertionError, match=r"beyond|Input/output|write failed"):
        vm.write("vda", SIZE, 512, 1)


def test_a_vm_survives_neither_kill_nor_the_end_of_the_test(tmp_path: Path) -> None:
    with Qemu([Disk("vda", create(tmp_path / "a.qcow2", SIZE))]) as vm:
        vm.write("vda", 0, 512, 5)
        vm.flush()
        vm.kill()
        vm.start()
        assert vm.contents("vda")[:512] == b"\x05" * 512
        vm.restart()
        pid = vm.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not vm.folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a QEMU of another user")
def test_qemu_of_another_user(start_qemu: StartQemu, open_folder: Path) -> None:
    image = create(open_folder / "a.qcow2", SIZE)
    image.chmod(0o666)
    vm = start_qemu([Disk("vda", image)], user="nobody")
    assert Path(f"/proc/{vm.pid}").stat().st_uid != 0
    vm.write("vda", 0, 512, 5)
    assert vm.contents("vda")[:512] == b"\x05" * 512


def test_the_load_logs_what_it_writes(start_qemu: StartQemu, tmp_path: Path) -> None:
    names = ("vda", "vdb")
    vm = start_qemu([Disk(name, create(tmp_path / name, SIZE)) for name in names])
    with Writer(vm, dict.fromkeys(names, SIZE)) as load:
        load.wait_for(100)
    before = dict.fromkeys(names, bytes(SIZE))
    after = {name: vm.contents(name) for name in names}
    assert len(load.log) in instants(before, load.log, after)
    assert len(load.log) - 5 not in instants(before, load.log, after)


def _state(before: bytes, log: list[Write], disk: str, count: int) -> bytes:
    state = bytearray(before)
    for write in log[:count]:
        if write.disk == disk:
            state[write.block] = write.byte
    return bytes(state)


def test_disks_of_different_instants_have_none_in_common() -> None:
    log = [Write(n, "ab"[n % 2], n // 2 % 4, n, in_pause=False) for n in range(1, 21)]
    before = {"a": bytes(4), "b": bytes(4)}

    def point(a: int, b: int) -> dict[str, bytes]:
        return {"a": _state(before["a"], log, "a", a), "b": _state(before["b"], log, "b", b)}

    assert instants(before, log, point(9, 9), block_size=1) == [9]
    assert instants(before, log, point(9, 15), block_size=1) == []


@pytest.mark.parametrize("held_by_a", [10, 9])
def test_a_write_in_the_pause_may_be_on_either_side(held_by_a: int) -> None:
    log = [Write(n, "a", n % 4, n, in_pause=n == 10) for n in range(1, 21)]
    before = {"a": bytes(4)}
    found = {"a": _state(before["a"], log, "a", held_by_a)}
    assert held_by_a in instants(before, log, found, block_size=1)


def test_images_hold_what_they_were_given(tmp_path: Path) -> None:
    given = pattern(SIZE, seed=3)
    for name, options in {"v3": "", "v2": "compat=0.10"}.items():
        assert contents(create(tmp_path / name, SIZE, contents=given, options=options)) == given
    split = create(tmp_path / "split", SIZE, contents=given, data_file=True)
    assert contents(split) == given
