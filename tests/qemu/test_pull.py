# SPDX-License-Identifier: Apache-2.0
"""Reading a view over NBD: the bytes of the instant, of what changed and nothing else."""

import threading
from pathlib import Path

import pytest

from lab.backups import leftovers
from lab.disks import CLUSTER, MIB, Disk, create, first_difference, pattern
from lab.qemu import Qemu, StartQemu
from qmpbackup.machine.pull import Method
from qmpbackup.nbd.reader import Flow
from stock.pulling import CHUNK, Puller

SIZE = 20 * MIB
ODD = 9 * MIB + 512


def two_disks(start_qemu: StartQemu, folder: Path) -> Qemu:
    """A qcow2 disk, and a raw one whose last chunk is short."""
    return start_qemu(
        [
            Disk("vda", create(folder / "a", SIZE, contents=pattern(SIZE, 1))),
            Disk("vdb", create(folder / "b", ODD, "raw", contents=pattern(ODD, 2)), "raw"),
        ]
    )


@pytest.fixture(params=Method)
def way(request: pytest.FixtureRequest, tmp_path: Path, start_qemu: StartQemu) -> Method:
    """Every way that is right for this QEMU."""
    chosen: Method = request.param
    if chosen is Method.V1:
        vm = start_qemu([Disk("vda", create(tmp_path / "any", MIB))])
        if vm.qmp.version < (8, 0, 0):
            pytest.skip("this QEMU's snapshot-access is not to be read in large requests")
    return chosen


def test_a_whole_disk_is_read(start_qemu: StartQemu, tmp_path: Path, way: Method) -> None:
    vm = two_disks(start_qemu, tmp_path)
    before = {disk: vm.contents(disk) for disk in ("vda", "vdb")}
    with Puller(vm, tmp_path, way=way) as run:
        run.take()
        found = run.read()
        run.pull.finish()
    assert run.complaints == []
    assert leftovers(vm) == []
    for disk, contents in before.items():
        assert not first_difference(found[disk].over(bytes(len(contents))), contents)
        assert found[disk].changed == list(range(-(-len(contents) // CHUNK)))


def test_changed_chunks_are_read_while_the_guest_writes(
    start_qemu: StartQemu, tmp_path: Path, way: Method
) -> None:
    vm = two_disks(start_qemu, tmp_path)
    base = {disk: vm.contents(disk) for disk in ("vda", "vdb")}
    with Puller(vm, tmp_path) as first:
        first.take()
    vm.write("vda", 3 * MIB + 512, 1024, 7)
    vm.write("vda", 10 * MIB - CLUSTER, 2 * CLUSTER, 8)
    vm.write("vdb", 4 * MIB, 512, 9)
    instant = {disk: vm.contents(disk) for disk in ("vda", "vdb")}
    with Puller(vm, tmp_path, first.bitmaps, way=way) as run:
        run.take(samples={0: [3, 15], 1: [0, 9]})
        for disk, size in (("vda", SIZE), ("vdb", ODD)):
            vm.write(disk, 0, size, 0xEE)
        vm.qemu_io("vda", f"discard {5 * MIB} {10 * MIB}")
        vm.qemu_io("vda", f"write -z -u {9 * MIB} {2 * MIB}")
        found = run.read()
        run.pull.finish()
    assert run.complaints == []
    assert leftovers(vm) == []
    assert (found["vda"].changed, found["vda"].wanted) == ([3, 9, 10], [3, 9, 10, 15])
    assert (found["vdb"].changed, found["vdb"].wanted) == ([4], [0, 4, 9])
    for disk, contents in instant.items():
        assert not first_difference(found[disk].over(base[disk]), contents), disk
    assert found["vda"].chunks[15] == base["vda"][15 * MIB : 16 * MIB]
    assert found["vdb"].chunks[0] == base["vdb"][:MIB]


def test_holes_and_zeroes_are_not_read(start_qemu: StartQemu, tmp_path: Path, way: Method) -> None:
    # Before 8.0 QEMU copies in small pieces, also what is a hole.
    size = 1 << (33 if way is Method.STAGED else 40)
    vm = start_qemu([Disk("vda", create(tmp_path / "a", size))])
    vm.write("vda", size // 2, 512, 1)
    with Puller(vm, tmp_path, way=way) as run:
        run.take()
        (seat,) = run.seats
        with run.pull.open(seat) as disk:
            assert disk.bytes_to_read == CHUNK
            found = [(chunk.index, chunk.count, chunk.data is None) for chunk in disk.chunks()]
    half = size // 2 // CHUNK
    assert found in (
        [(0, half, True), (half, 1, False), (half + 1, half - 1, True)],
        [(0, half, True), (half + 1, half - 1, True), (half, 1, False)],
    )


def test_a_consumer_that_keeps_buffers_is_waited_for(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a", SIZE, contents=pattern(SIZE, 3)))])
    contents = vm.contents("vda")
    with Puller(vm, tmp_path) as run:
        run.take()
        (seat,) = run.seats
        with run.pull.open(seat, Flow(requests=2, buffers=3)) as disk:
            found, kept = {}, []
            for chunk in disk.chunks():
                if chunk.data is not None:
                    found[chunk.index] = bytes(chunk.data)
                    kept.append(chunk)
                if len(kept) == 3:
                    threading.Thread(target=kept[0].release).start()
                    del kept[0]
            for chunk in kept:
                chunk.release()
    assert found == {at: contents[at * CHUNK :][:CHUNK] for at in found}
    assert len(found) > 3


def test_cancelling_ends_the_reading(start_qemu: StartQemu, tmp_path: Path) -> None:
    vm = start_qemu([Disk("vda", create(tmp_path / "a", SIZE, contents=pattern(SIZE, 4)))])
    with Puller(vm, tmp_path) as run:
        run.take()
        (seat,) = run.seats
        with run.pull.open(seat, Flow(requests=1, buffers=1)) as disk:
            count = 0
            for chunk in disk.chunks():
                count += 1
                disk.cancel()
                chunk.release()
    assert count < SIZE // CHUNK
    assert run.complaints == []
    assert leftovers(vm) == []


@pytest.mark.parametrize("firmware", ["halt", "seabios"])
def test_disks_of_iothreads(start_qemu: StartQemu, tmp_path: Path, firmware: str) -> None:
    """Halted firmware leaves the devices in the main loop."""
    vm = start_qemu(
        [
            Disk("vda", create(tmp_path / "a", SIZE, contents=pattern(SIZE, 5)), iothread="io0"),
            Disk("vdb", create(tmp_path / "b", ODD, "raw", contents=pattern(ODD, 6)), "raw"),
        ],
        iothreads=["io0"],
        firmware=firmware,
    )
    base = {disk: vm.contents(disk) for disk in ("vda", "vdb")}
    with Puller(vm, tmp_path) as first:
        first.take()
        whole = first.read()
        first.pull.finish()
    for disk, contents in base.items():
        assert not first_difference(whole[disk].over(bytes(len(contents))), contents)
    vm.write("vda", 3 * MIB + 512, 1024, 7)
    vm.write("vdb", 512, 512, 8)
    instant = {disk: vm.contents(disk) for disk in ("vda", "vdb")}
    with Puller(vm, tmp_path, first.bitmaps) as run:
        run.take(samples={0: [19]})
        vm.write("vda", 0, SIZE, 0xEE)
        vm.write("vdb", 0, ODD, 0xEE)
        found = run.read()
        run.pull.finish()
    assert run.complaints == []
    assert leftovers(vm) == []
    assert (found["vda"].changed, found["vda"].wanted) == ([3], [3, 19])
    for disk, contents in instant.items():
        assert not first_difference(found[disk].over(base[disk]), contents)


def test_of_a_disk_that_grew_the_new_part_can_be_sampled(
    start_qemu: StartQemu, tmp_path: Path, way: Method
) -> None:
    vm = two_disks(start_qemu, tmp_path)
    base = vm.contents("vdb")
    with Puller(vm, tmp_path) as first:
        first.take()
    vm.qmp("block_resize", node_name="node-vdb", size=ODD + 3 * MIB)
    vm.write("vdb", ODD + MIB, 512, 1)
    vm.write("vdb", MIB, 512, 2)
    instant = vm.contents("vdb")
    with Puller(vm, tmp_path, first.bitmaps, way=way) as run:
        run.take(samples={1: range(ODD // CHUNK, ODD // CHUNK + 4)})
        vm.write("vdb", 0, ODD + 3 * MIB, 3)
        found = run.read()["vdb"]
        run.pull.finish()
    assert found.wanted == [1, 9, 10, 11, 12]
    assert not first_difference(found.over(base + bytes(3 * MIB)), instant)
    assert run.complaints == []


def test_a_vm_that_does_not_run_is_read(start_qemu: StartQemu, tmp_path: Path, way: Method) -> None:
    image = create(tmp_path / "c", SIZE, contents=pattern(SIZE, 7))
    vm = start_qemu([Disk("vda", image)], paused=True)
    contents = vm.contents("vda")
    with Puller(vm, tmp_path, way=way) as run:
        run.take()
        found = run.read()["vda"]
        run.pull.finish()
    assert not first_difference(found.over(bytes(SIZE)), contents)
    assert run.complaints == []
    assert leftovers(vm) == []
    assert vm.qmp("query-status")["status"] == "prelaunch"
