# SPDX-License-Identifier: Apache-2.0
"""The command line that boots a point: every device stays, back-ends are replaced."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from qmpbackup.model import VmConfig, VmIdentity
from qmpbackup.plan.boot_disks import Attached
from qmpbackup.plan.booting import Launch, Setting, launch
from qmpbackup.plan.qemu_options import escaped, members_of, memory_of, option, parse, render

MIB = 1024 * 1024
AROUND = Setting(sockets="/run/b", logs="/l", monitors=("qmp",))


def attached(disk: str, file: str = "", number: int = 0) -> Attached:
    inner = {"driver": "file", "filename": f"/new/{disk}", "node-name": f"boot{number}-file"}
    node = {"driver": "qcow2", "node-name": f"boot{number}", "file": inner, "discard": "unmap"}
    return Attached(disk, file, node)


def launched(*words: str, disks: Sequence[Attached] = (), around: Setting = AROUND) -> Launch:
    record = VmConfig(VmIdentity(), "7.2", "pc-q35-7.2", ("qemu-system-x86_64", *words))
    return launch(record, disks, around)


def values(found: Launch, name: str) -> list[str]:
    return [each.value or "" for each in parse(found.argv[1:]) if each.name == name]


@pytest.mark.parametrize(
    "words",
    [
        ["-device", "virtio-blk-pci,drive=a,id=b", "-S", "-m", "64M"],
        ["-append", "", "-kernel", "/k"],
        ["disk.img"],
        ["-nodefaults", "-name", "a,,b,debug-threads=on"],
    ],
)
def test_options_come_back_as_they_were(words: list[str]) -> None:
    assert list(render(list(parse(words)))) == words


def test_a_program_that_a_loader_ran() -> None:
    loader = ("/lib/ld-linux.so.2", "--library-path", "/l", "/usr/bin/qemu-system-x86_64")
    record = VmConfig(VmIdentity(), "10.0", "", (*loader, "-m", "64M"))
    assert launch(record, [], AROUND).argv[:6] == (*loader, "-m", "64M")


def test_two_dashes_are_one() -> None:
    assert list(parse(["--enable-kvm", "--m", "1"])) == [option("enable-kvm"), option("m", "1")]


def test_members() -> None:
    found = members_of("device", "virtio-blk-pci,serial=a,,b=c,disable-legacy")
    assert found.values == {"driver": "virtio-blk-pci", "serial": "a,b=c", "disable-legacy": None}
    assert found.render() == "virtio-blk-pci,serial=a,,b=c,disable-legacy"
    assert escaped("a,b") == "a,,b"
    assert members_of("device", '{"driver": "x", "n": 1}').replaced({"n": 2}).render() == (
        '{"driver": "x", "n": 2}'
    )
    assert members_of("device", "{no json").text("{no json") == ""


@pytest.mark.parametrize(
    "words",
    [
        [
            *("-blockdev", "qcow2,node-name=n,file.driver=file,file.filename=/old/a"),
            *("-device", "virtio-blk-pci,drive=n,id=vda,bootindex=1"),
        ],
        [
            *("-blockdev", '{"driver":"file","filename":"/old/a","node-name":"n-storage"}'),
            *("-blockdev", '{"driver":"qcow2","node-name":"n","file":"n-storage"}'),
            *("-device", '{"driver":"virtio-blk-pci","drive":"n","id":"vda","bootindex":1}'),
        ],
        [
            *("-drive", "if=none,id=d,file=/old/a,format=qcow2"),
            *("-device", "scsi-hd,drive=d,id=vda,bootindex=1"),
        ],
    ],
)
def test_a_disk_of_a_device(words: list[str]) -> None:
    found = launched(*words, disks=[attached("vda")])
    assert found.obstacles == ()
    assert found.left_out == ()
    (node,) = values(found, "blockdev")
    assert json.loads(node)["file"]["filename"] == "/new/vda"
    assert not values(found, "drive")
    (device,) = (members_of("device", each) for each in values(found, "device"))
    assert device.text("drive") == "boot0"
    assert device.text("rerror") == "stop"
    assert device.text("bootindex") == "1"
    assert "/old/a" not in " ".join(found.argv)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["-drive", "if=virtio,file=/old/a,format=raw,cache=none,index=3"], {"index": "3"}),
        (["-hda", "/old/a"], {"index": "0", "media": "disk"}),
        (["-hdb", "/old/a"], {"index": "1"}),
        (["/old/a"], {"index": "0"}),
        (["-drive", "file=/old/a,if=pflash,unit=1"], {"unit": "1"}),
    ],
)
def test_a_disk_of_a_drive_is_known_by_its_file(words: list[str], kept: dict[str, str]) -> None:
    found = launched(*words, disks=[attached("virtio0", "/old/a")])
    assert found.obstacles == ()
    (drive,) = (members_of("drive", each) for each in values(found, "drive"))
    assert drive.text("file.filename") == "/new/virtio0"
    assert drive.text("file") == ""
    assert {name: drive.text(name) for name in kept} == kept
    assert drive.text("rerror") == ("" if "unit" in kept else "stop")
    assert not values(found, "blockdev")


@pytest.mark.parametrize(
    ("recorded", "placed"),
    [("/v/vars.overlay.qcow2", True), ("/v/vars.qcow2", True), ("/v/vars", False)],
)
def test_the_line_of_a_settled_vm_names_an_overlay_that_is_no_more(
    recorded: str, placed: bool
) -> None:
    node = f"qcow2,node-name=boot0,file.driver=file,file.filename={recorded}"
    found = launched(
        *("-machine", "q35,pflash1=boot0", "-blockdev", node),
        disks=[attached("vars", "/v/vars.qcow2")],
    )
    assert (found.obstacles == ()) == placed


def test_variables_of_firmware() -> None:
    found = launched(
        *("-machine", "q35,accel=kvm,smm=on,pflash0=code,pflash1=vars"),
        *("-blockdev", "raw,node-name=code,read-only=on,file.driver=file,file.filename=/CODE.fd"),
        *("-blockdev", "raw,node-name=vars,file.driver=file,file.filename=/v"),
        disks=[attached("pflash1")],
    )
    (machine,) = (members_of("machine", each) for each in values(found, "machine"))
    assert machine.text("type") == "pc-q35-7.2"
    assert machine.text("pflash0") == "code"
    assert machine.text("pflash1") == "boot0"
    assert machine.text("smm") == "on"
    assert values(found, "accel") == ["kvm", "tcg"]
    assert found.needs == ("/CODE.fd",)
    assert found.obstacles == ()


def test_what_a_guest_waits_for_stays() -> None:
    found = launched(
        *("-chardev", "socket,path=/old,server=on,wait=off,id=ga"),
        *("-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"),
        *("-chardev", "stdio,id=s", "-serial", "chardev:s", "-serial", "file:/x"),
        *("-netdev", "tap,id=n,fd=27,vhost=on", "-device", "virtio-net-pci,netdev=n,mac=1:2"),
        *("-nic", "tap,model=e1000,mac=3:4"),
    )
    assert found.agent == "/run/b/guest-ga"
    assert found.consoles == ("/l/serial0.log",)
    assert values(found, "device") == [
        "virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
        "virtio-net-pci,netdev=n,mac=1:2",
    ]
    assert values(found, "netdev") == ["hubport,id=n,hubid=1"]
    assert values(found, "nic") == ["hubport,hubid=2,model=e1000,mac=3:4"]
    assert all("/old" not in each for each in found.argv)


def test_a_network_that_is_asked_for_is_the_recorded_one() -> None:
    around = Setting(sockets="/run/b", logs="/l", network=True)
    found = launched("-netdev", "tap,id=n", "-nic", "user", around=around)
    assert values(found, "netdev") == ["tap,id=n"]
    assert values(found, "nic") == ["user"]


def test_a_vm_with_a_network_by_default_has_none() -> None:
    assert values(launched("-m", "1G"), "nic") == ["hubport,hubid=1"]
    assert values(launched("-nodefaults"), "nic") == []


GONE: list[tuple[Any, ...]] = [
    ("-qmp", "unix:/q", "-monitor", "stdio", "-mon", "chardev=m"),
    ("-daemonize", "-pidfile", "/p", "-runas", "u", "-S", "-incoming", "defer", "-D", "/d"),
    ("-vnc", ":1", "-spice", "port=1", "-display", "gtk", "-snapshot", "-sandbox", "on"),
    ("-add-fd", "set=1,fd=3", "-mem-path", "/hugepages"),
]


@pytest.mark.parametrize("words", GONE)
def test_what_belongs_to_the_process_is_gone(words: tuple[str, ...]) -> None:
    found = launched("-nodefaults", *words)
    assert not {"/q", "/p", "u", "defer", ":1", "port=1", "gtk", "/hugepages"} & set(found.argv)
    assert values(found, "qmp") == ["unix:/run/b/qmp,server=on,wait=off"]
    assert found.argv[-1] == "-S"


def test_what_is_of_that_host_is_left_out_and_said() -> None:
    found = launched(
        *("-device", "vfio-pci,host=01:00.0", "-device", "usb-host,hostbus=1"),
        *("-object", "secret,id=s,data=***"),
        *("-chardev", "spicevmc,id=sp", "-device", "virtserialport,chardev=sp"),
        *("-tpmdev", "emulator,id=t,chardev=c", "-device", "tpm-crb,tpmdev=t"),
        *("-object", "memory-backend-file,id=m,mem-path=/dev/hugepages,size=1G"),
    )
    assert values(found, "device") == []
    assert values(found, "object") == ["memory-backend-ram,id=m,size=1G"]
    said = " ".join(found.left_out)
    for word in ("vfio-pci", "usb-host", "object s", "virtserialport", "tpm"):
        assert word in said


@pytest.mark.parametrize(
    "words",
    [
        ("-device", "virtio-input-host-pci,evdev=/dev/input/event3"),
        ("-device", "usb-mtp,rootdir=/home"),
        ("-object", "input-barrier,id=b,name=a,server=192.0.2.1"),
        ("-object", '{"qom-type":"iommufd","id":"i"}'),
        ("-object", "cryptodev-vhost-user,id=c,chardev=x"),
        ("-plugin", "file=/x.so"),
        ("-qtest", "unix:/x,server=on"),
    ],
)
def test_no_device_of_that_host_and_no_other_machine(words: tuple[str, ...]) -> None:
    assert not set(words) & set(launched(*words).argv)


def test_sound_is_heard_by_nobody() -> None:
    assert values(launched("-audio", "pa,model=hda,server=192.0.2.1"), "audio") == [
        "none,model=hda"
    ]


def test_serial_ports_are_as_many_as_recorded_and_share_no_name() -> None:
    port = ("-chardev", "pty,id=serial0", "-device", "isa-serial,chardev=serial0")
    assert values(launched(*port), "serial") == []
    found = launched(*port, "-serial", "stdio")
    names = [members_of("chardev", each).text("id") for each in values(found, "chardev")]
    assert len(names) == len(set(names)) == 2
    assert values(found, "serial") == [f"chardev:{names[1]}"]


def test_images_below_a_disk_are_not_needed() -> None:
    below = '{"node-name":"f2","read-only":true,"driver":"qcow2","file":"s2","backing":null}'
    found = launched(
        *("-blockdev", '{"driver":"file","filename":"/base","node-name":"s2"}'),
        *("-blockdev", below),
        *("-blockdev", '{"driver":"file","filename":"/old/a","node-name":"s1"}'),
        *("-blockdev", '{"node-name":"f1","driver":"qcow2","file":"s1","backing":"f2"}'),
        *("-device", "virtio-blk-pci,drive=f1,id=vda"),
        disks=[attached("vda", "/old/a")],
    )
    assert found.needs == ()
    assert "/base" not in " ".join(found.argv)


def test_drives_that_the_point_does_not_hold() -> None:
    found = launched(
        *("-drive", "if=none,id=cd,file=/iso,media=cdrom", "-device", "ide-cd,drive=cd"),
        *("-drive", "if=none,id=x,file=/x", "-device", "virtio-blk-pci,drive=x,id=vdx"),
        *("-cdrom", "/iso2"),
    )
    assert found.needs == ("/iso", "/iso2")
    assert "vdx" in " ".join(found.left_out)
    assert [members_of("device", each).text("driver") for each in values(found, "device")] == [
        "ide-cd"
    ]


def test_obstacles() -> None:
    assert "vda" in launched(disks=[attached("vda")]).obstacles[0]
    assert "-readconfig" in launched("-readconfig", "vm.cfg").obstacles[0]
    assert "started" in launched("-kernel", "boot/vmlinuz").obstacles[0]
    assert launched("-bios", "bios.bin").obstacles == ()  # of QEMU's own
    empty = VmConfig(VmIdentity(), "7.2")
    assert "does not say" in launch(empty, [], AROUND).obstacles[0]


def test_processors_and_accelerators() -> None:
    found = launched("-cpu", "host,+x", "-enable-kvm")
    assert values(found, "cpu") == ["max,+x"]
    assert values(found, "accel") == ["kvm", "tcg"]
    around = Setting(sockets="/run/b", logs="/l", accelerators=("tcg",))
    assert values(launched("-accel", "kvm", around=around), "accel") == ["tcg"]


SANDBOX = Setting(sockets="/run/b", logs="/l", sandbox=True)
ELSEWHERE = Setting(sockets="/run/b", logs="/l", is_here=lambda _: False)

DEVICES = [
    "virtio-blk-pci",
    "virtio-net-pci-non-transitional",
    "scsi-hd",
    "ich9-usb-ehci1",
    "qemu-xhci",
    "pcie-root-port",
    "VGA",
    "qxl-vga",
    "isa-serial",
    "virtserialport",
    "pvpanic",
    "intel-hda",
    "vmgenid",
    "EPYC-Milan-x86_64-cpu",
]
HOSTILE = [
    "vfio-pci",
    "usb-host",
    "vhost-vsock-pci",
    "vhost-user-fs-pci",
    "loader,file=/etc/shadow,addr=0",
    "ivshmem-plain",
    "virtio-gpu-gl-pci",
    "virtio-gpu-rutabaga-pci",
    "x-pci-proxy-dev",
    "tomorrows-device",
]


@pytest.mark.parametrize("driver", DEVICES)
def test_a_sandbox_has_emulated_devices(driver: str) -> None:
    found = launched("-device", f"{driver},id=x,romfile=/rom", around=SANDBOX)
    assert values(found, "device") == [f"{driver},id=x"]
    assert found.left_out == ()


@pytest.mark.parametrize("driver", HOSTILE)
def test_a_sandbox_has_no_device_that_is_not_known(driver: str) -> None:
    found = launched("-device", driver, "-m", "1G", around=SANDBOX)
    assert values(found, "device") == []
    assert driver.partition(",")[0] in found.left_out[0]
    assert values(found, "m") == ["1G"]


@pytest.mark.parametrize(
    "words",
    [
        ("-object", "x-tomorrow,id=o"),
        ("-object", "can-host-socketcan,id=o,if=can0"),
        ("-tomorrow", "x"),
        ("-set", "device.x.romfile=/etc/shadow"),
        ("-semihosting-config", "enable=on"),
        ("-fw_cfg", "name=opt/x,file=/etc/shadow"),
        ("-smbios", "file=/etc/shadow"),
        ("-global", "virtio-net-pci.romfile=/etc/shadow"),
    ],
)
def test_a_sandbox_has_no_setting_and_object_that_is_not_known(words: tuple[str, ...]) -> None:
    found = launched(*words, around=SANDBOX)
    assert not set(words) & set(found.argv)
    assert len(found.left_out) == 1


def test_a_sandbox_keeps_what_a_machine_consists_of() -> None:
    words = ("-m", "1G", "-smp", "2", "-name", "n", "-global", "ICH9-LPC.disable_s3=1", "-no-hpet")
    found = launched(
        *words,
        *("-object", "rng-random,id=r,filename=/etc/shadow", "-object", "iothread,id=t"),
        *("-monitor", "stdio", "-daemonize"),
        around=SANDBOX,
    )
    assert found.argv[1 : 1 + len(words)] == words
    assert values(found, "object") == ["rng-builtin,id=r", "iothread,id=t"]
    assert found.left_out == ()


MEDIA = [
    ("-drive", "if=none,id=cd,file=/iso,media=cdrom", "-device", "ide-cd,drive=cd,id=d"),
    ("-drive", "if=none,id=cd,file=/iso,readonly=on", "-device", "scsi-cd,drive=cd,id=d"),
    (
        *("-blockdev", "raw,node-name=cd,read-only=on,file.driver=file,file.filename=/iso"),
        *("-device", "ide-cd,drive=cd,id=d"),
    ),
]


@pytest.mark.parametrize("words", MEDIA)
@pytest.mark.parametrize("around", [SANDBOX, ELSEWHERE])
def test_a_medium_that_is_not_to_be_had_leaves_its_drive_empty(
    words: tuple[str, ...], around: Setting
) -> None:
    found = launched(*words, around=around)
    assert "/iso" not in " ".join(found.argv)
    assert found.needs == ()
    (device,) = (members_of("device", each) for each in values(found, "device"))
    assert (device.text("id"), device.text("drive")) == ("d", "")
    assert len(found.left_out) == 1
    assert found.obstacles == ()
    assert "/iso" in " ".join(launched(*words).argv)


def test_an_empty_drive_of_its_own() -> None:
    found = launched("-cdrom", "/iso", around=ELSEWHERE)
    (drive,) = (members_of("drive", each) for each in values(found, "drive"))
    assert (drive.text("media"), drive.text("file")) == ("cdrom", "")


@pytest.mark.parametrize(
    "words",
    [
        ("-drive", "if=none,id=x,file=nbd:192.0.2.1:1,readonly=on"),
        ("-drive", "if=none,id=x,file=json:{},readonly=on"),
        ("-drive", "if=none,id=x,file.driver=host_device,file.filename=/dev/sda,readonly=on"),
        ("-drive", "if=none,id=x,file=/a,backing.file.filename=/etc/shadow,readonly=on"),
        ("-blockdev", '{"driver":"nbd","node-name":"x","read-only":true,"server":{"host":"h"}}'),
        ("-blockdev", "host_device,node-name=x,read-only=on,filename=/dev/sda"),
        ("-blockdev", "raw,node-name=x,read-only=on,file.driver=https,file.url=https://h/"),
    ],
)
def test_only_plain_files_are_read_as_recorded(words: tuple[str, ...]) -> None:
    found = launched(*words, "-device", "virtio-blk-pci,drive=x,id=vdx")
    assert values(found, "device") == values(found, "drive") == values(found, "blockdev") == []
    assert "vdx" in found.left_out[0]


def test_firmware_stays_in_a_sandbox() -> None:
    code = "raw,node-name=code,read-only=on,file.driver=file,file.filename=/CODE.fd"
    found = launched("-machine", "q35,pflash0=code", "-blockdev", code, around=SANDBOX)
    assert values(found, "blockdev") == [code]
    drive = "if=pflash,readonly=on,format=raw,file=/CODE.fd"
    assert values(launched("-drive", drive, around=SANDBOX), "drive") == [drive]


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        ((), (128 * MIB, 128 * MIB)),
        (("-m", "192"), (192 * MIB, 192 * MIB)),
        (("-m", "size=2G,slots=2,maxmem=4G"), (2048 * MIB, 2048 * MIB)),
        (
            ("-m", "1G", "-object", "memory-backend-ram,id=a,size=1073741824"),
            (1024 * MIB, 2048 * MIB),
        ),
    ],
)
def test_how_much_memory_a_machine_has(words: tuple[str, ...], memory: tuple[int, int]) -> None:
    assert memory_of(("qemu-system-x86_64", *words)) == memory


def test_a_program_that_is_no_qemu_is_not_started() -> None:
    record = VmConfig(VmIdentity(), "10.0", "", ("/bin/sh", "-c", "touch /x"))
    assert "no QEMU" in launch(record, [], AROUND).obstacles[0]
