# SPDX-License-Identifier: Apache-2.0
"""Every kind of disk that QEMU can give a guest: found, named, backed up and restored right."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.backups import assert_restores, back_up, leftovers, levels, try_backup
from lab.devices import loop_device
from lab.disks import MIB, Bus, Disk, contents, create, pattern, qemu_img
from lab.qemu import Qemu, StartQemu

SIZE = 16 * MIB


def goes_through_two_points(vm: Qemu, target: Path, folder: Path, *ids: str) -> None:
    """A full and an incremental of a VM with writes between them give back what was there."""
    full = back_up(vm, target)
    before = {name: vm.contents(name) for name in ids}
    for number, name in enumerate(ids):
        vm.write(name, (number + 1) * MIB + 512, 70000 // 512 * 512, number + 1)
    inc = back_up(vm, target, "inc")
    assert set(levels(inc)) == set(ids)
    assert_restores(target, full["id"], before, folder)
    assert_restores(target, inc["id"], {name: vm.contents(name) for name in ids}, folder)
    assert leftovers(vm) == []


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi", "ide", "nvme", "usb"])
def test_disks_on_every_bus(bus: Bus, tmp_path: Path, start_qemu: StartQemu) -> None:
    image = create(tmp_path / "a.qcow2", SIZE, contents=pattern(SIZE, 1))
    vm = start_qemu([Disk("vda", image, bus=bus)])
    goes_through_two_points(vm, tmp_path / "target", tmp_path, "vda")


@pytest.mark.parametrize("options", ["compat=0.10", "cluster_size=4k", "cluster_size=2M"])
def test_qcow2_of_other_shapes(options: str, tmp_path: Path, start_qemu: StartQemu) -> None:
    image = create(tmp_path / "a.qcow2", SIZE, contents=pattern(SIZE, 2), options=options)
    vm = start_qemu([Disk("vda", image)])
    goes_through_two_points(vm, tmp_path / "target", tmp_path, "vda")


def test_raw_files_and_external_data_files(tmp_path: Path, start_qemu: StartQemu) -> None:
    raw = create(tmp_path / "a.raw", SIZE, "raw", contents=pattern(SIZE, 3))
    split = create(tmp_path / "b.qcow2", SIZE, contents=pattern(SIZE, 4), data_file=True)
    vm = start_qemu([Disk("vda", raw, "raw"), Disk("vdb", split)])
    goes_through_two_points(vm, tmp_path / "target", tmp_path, "vda", "vdb")


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[Path]:
    """A block device with contents."""
    raw = create(tmp_path / "loop.raw", SIZE, "raw", contents=pattern(SIZE, 5))
    with loop_device(raw) as device:
        yield device


def test_block_devices(block_device: Path, tmp_path: Path, start_qemu: StartQemu) -> None:
    vm = start_qemu([Disk("vda", block_device, "raw")])
    goes_through_two_points(vm, tmp_path / "target", tmp_path, "vda")


@pytest.mark.parametrize(
    "filters", [("throttle",), ("copy-on-read",), ("copy-on-read", "throttle")]
)
def test_filters_above_the_image(
    filters: tuple[str, ...], tmp_path: Path, start_qemu: StartQemu
) -> None:
    image = create(tmp_path / "a.qcow2", SIZE, contents=pattern(SIZE, 6))
    vm = start_qemu([Disk("vda", image, filters=filters)])
    goes_through_two_points(vm, tmp_path / "target", tmp_path, "vda")
    on = {node["node-name"] for node in _nodes(vm) if node.get("dirty-bitmaps")}
    assert on == {"node-vda"}, "the bitmaps belong on the image's own node"


def test_a_backing_chain_is_flattened_into_the_full(tmp_path: Path, start_qemu: StartQemu) -> None:
    base = create(tmp_path / "base.qcow2", SIZE, contents=pattern(SIZE, 7))
    top = create(tmp_path / "top.qcow2", SIZE, backing=(base, "qcow2"))
    vm = start_qemu([Disk("vda", top)])
    vm.write("vda", 0, MIB, 1)
    target = tmp_path / "target"
    goes_through_two_points(vm, target, tmp_path, "vda")
    (full,) = (target / "vda").glob("FULL-*")
    assert "backing-filename" not in json.loads(qemu_img("info", "--output=json", str(full)))


def test_disks_with_iothreads(tmp_path: Path, start_qemu: StartQemu) -> None:
    images = [create(tmp_path / name, SIZE, contents=pattern(SIZE, 8)) for name in "ab"]
    disks = [
        Disk("vda", images[0], iothread="io0"),
        Disk("sda", images[1], bus="virtio-scsi", iothread="io1"),
    ]
    vm = start_qemu(disks, iothreads=("io0", "io1"), firmware="seabios")
    goes_through_two_points(vm, tmp_path / "target", tmp_path, "vda", "sda")


def test_drives_of_old_command_lines_go_by_their_drive_names(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    images = {
        name: create(tmp_path / f"{name}.qcow2", SIZE, contents=pattern(SIZE, 9))
        for name in ("ide0-hd0", "virtio0", "named")
    }
    arguments = (
        *("-hda", str(images["ide0-hd0"])),
        *("-drive", f"file={images['virtio0']},if=virtio,throttling.iops-total=5000"),
        *("-drive", f"file={images['named']},if=none,id=named"),
        *("-device", "virtio-blk-pci,drive=named"),
    )
    vm = start_qemu(args=arguments, machine="pc")
    goes_through_two_points(vm, tmp_path / "target", tmp_path, *images)
    folders = {path.name for path in (tmp_path / "target").iterdir() if path.is_dir()}
    assert folders == {*images, "points"}


def test_snapshot_mode_is_backed_up_as_the_guest_sees_it(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    image = create(tmp_path / "a.qcow2", SIZE, contents=pattern(SIZE, 10))
    drive = f"file={image},if=none,id=a,snapshot=on"
    vm = start_qemu(args=("-drive", drive, "-device", "virtio-blk-pci,drive=a"), machine="pc")
    before = contents(image)
    vm.write("a", 0, MIB, 1)
    point = back_up(vm, tmp_path / "target")
    expected = bytes([1]) * MIB + before[MIB:]
    assert_restores(tmp_path / "target", point["id"], {"a": expected}, tmp_path)


def test_firmware_variables_and_floppies_are_copied_whole_each_time(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    code = create(tmp_path / "code.raw", 256 * 1024, "raw")
    variables = create(tmp_path / "vars.raw", 540672, "raw", contents=pattern(540672, 11))
    floppy = create(tmp_path / "floppy.raw", 1474560, "raw", contents=pattern(1474560, 12))
    flash = "if=pflash,format=raw"
    vm = start_qemu(
        [Disk("fd", floppy, "raw", bus="floppy")],
        args=(
            *("-drive", f"{flash},unit=0,readonly=on,file={code}"),
            *("-drive", f"{flash},unit=1,file={variables}"),
        ),
        machine="pc",
        firmware=None,
        paused=True,
    )
    target = tmp_path / "target"
    first = back_up(vm, target)
    vm.write("fd", 512, 1024, 3)
    second = back_up(vm, target)
    assert levels(first) == levels(second) == {"fd": "full", "pflash1": "full"}
    assert all("small" in disk["reason"] for disk in second["disks"])
    assert {"name": "pflash0", "reason": "read-only"} in second["skipped"]
    expected = {"fd": vm.contents("fd"), "pflash1": variables.read_bytes()}
    assert_restores(target, second["id"], expected, tmp_path)


def test_empty_and_read_only_drives_are_skipped_with_the_reason(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    image = create(tmp_path / "a.qcow2", SIZE)
    fixed = create(tmp_path / "b.qcow2", SIZE)
    disks = [Disk("vda", image), Disk("vdb", fixed, read_only=True)]
    vm = start_qemu(disks, args=("-device", "ide-cd,id=cd"))
    skipped = {each["name"]: each["reason"] for each in back_up(vm, tmp_path / "t")["skipped"]}
    assert skipped == {"vdb": "read-only", "cd": "empty drive"}
    shown = cli.run("--socket", vm.socket, "info", "--show", "blockdev").check().out
    assert "empty drive" in shown
    assert "read-only" in shown


def test_names_that_are_no_folder_names_get_folders_of_their_own(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    images = [create(tmp_path / name, SIZE, contents=pattern(SIZE, 13)) for name in "ab"]
    vm = start_qemu([Disk("points", images[0]), Disk("x..y", images[1])])
    target = tmp_path / "target"
    point = back_up(vm, target)
    folders = {disk["id"]: disk["file"].split("/")[0] for disk in point["disks"]}
    assert folders["points"] != "points"
    expected = {folders[each]: vm.contents(each) for each in ("points", "x..y")}
    assert_restores(target, point["id"], expected, tmp_path)


def test_a_disk_goes_by_the_same_id_after_its_place_has_changed(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    images = {name: create(tmp_path / name, SIZE, contents=pattern(SIZE, 14)) for name in "ab"}
    target = tmp_path / "target"
    first = start_qemu([Disk("vda", images["a"]), Disk("vdb", images["b"])])
    back_up(first, target)
    first.quit()
    second = start_qemu([Disk("vdb", images["b"]), Disk("vda", images["a"])])
    second.write("vda", 0, MIB, 1)
    # The VM has neither name nor UUID, so only the address tells that it is the same.
    (target / "vm.json").write_text(
        (target / "vm.json").read_text().replace(str(first.socket), str(second.socket))
    )
    point = back_up(second, target, "inc")
    expected = {name: second.contents(name) for name in ("vda", "vdb")}
    assert_restores(target, point["id"], expected, tmp_path)


def test_names_with_line_ends_and_colours(tmp_path: Path, start_qemu: StartQemu) -> None:
    """QEMU takes any text for the id of a device, the name of a VM, an image, or a bitmap."""
    odd = "b\n\r\x1b[31m"
    first = create(tmp_path / "a\nb.qcow2", SIZE, contents=pattern(SIZE, 11))
    second = create(tmp_path / "b.qcow2", SIZE, contents=pattern(SIZE, 12))
    file = {"driver": "file", "filename": str(second)}
    node = {"driver": "qcow2", "node-name": "node-b", "file": file}
    device = {"driver": "virtio-blk-pci", "id": odd, "drive": "node-b"}
    arguments = ["-blockdev", json.dumps(node), "-device", json.dumps(device)]
    vm = start_qemu([Disk("vda", first)], args=arguments, name="v\nm")
    vm.qmp.command("block-dirty-bitmap-add", {"node": "node-b", "name": "another's\n\x1b[31m"})
    target = tmp_path / "target"
    back_up(vm, target)
    made = try_backup(vm, target, "inc").check()
    shown = cli.run("--socket", vm.socket, "doctor", "--target", target).check()
    listed = cli.run("list", "--target", target).check()
    assert "b\\n\\r\\x1b[31m" in made.out
    assert "\x1b" not in "".join(each.out + each.err for each in (made, shown, listed))
    point = json.loads(cli.run("list", "--target", target, "--json").check().out.splitlines()[-1])
    assert set(point["disks"]) == {"vda", odd}
    expected = {"vda": pattern(SIZE, 11), "b%0A%0D%1B%5B31m": pattern(SIZE, 12)}
    assert_restores(target, point["id"], expected, tmp_path)
    assert leftovers(vm) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a VM that root can tell from others")
def test_the_manifest_says_how_the_vm_was_started_but_no_secrets(
    tmp_path: Path, start_qemu: StartQemu
) -> None:
    image = create(tmp_path / "a.qcow2", SIZE)
    hidden = ["-object", "secret,id=s0,data=hunter2"]
    hidden += ["-object", '{"qom-type": "secret", "id": "s1", "data": "hunt\\"er2"}']
    hidden += ["-fw_cfg", "name=opt/com.example/login,string=hunter2,,too"]
    hidden += ["-smbios", "type=11,value=io.systemd.credential:login=hunter2,value=hunter2"]
    hidden += ["-smbios", "type=1,manufacturer=https://me:hunter2@example.com/"]
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(65536))
    words = 'root=/dev/vda api_token=hunter2 systemd.set_credential="login:hunter2 x" quiet'
    hidden += ["-kernel", str(kernel), "-append", words]
    hidden += ["-smbios", "type=1,serial=ds=nocloud;s=http://10.0.0.1/hunter2"]
    hidden += ["-object", "{'qom-type': 'secret', 'id': 's2', 'data': 'hunter2'}"]
    vm = start_qemu([Disk("vda", image)], args=[*hidden, "-append", ""], name="web")
    point = back_up(vm, tmp_path / "target")
    assert point["vm"]["command_line"][-2:] == ["-append", ""]
    assert point["vm"]["name"] == "web"
    assert "-machine" in point["vm"]["command_line"]
    told = " ".join(point["vm"]["command_line"])
    for text in ("https://***@example.com/", "opt/com.example/login,", "type=11,", "root=/dev/vda"):
        assert text in told
    assert told.split("root=")[1].split(" -")[0].endswith("quiet")
    assert "er2" not in json.dumps(point)


def _nodes(vm: Qemu) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = vm.qmp("query-named-block-nodes", flat=True)
    return nodes
