# SPDX-License-Identifier: Apache-2.0
"""Devices that hold data and are no block devices: which of them are named."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qmpbackup.errors import CommandError
from qmpbackup.machine.attached import Ask, holding_data
from qmpbackup.model import Absence
from qmpbackup.plan.commands import Command

PERIPHERAL, ANONYMOUS = "/machine/peripheral", "/machine/peripheral-anon"
Devices = Mapping[str, tuple[str, Mapping[str, object]]]


def machine(named: Devices, anonymous: Devices | None = None) -> Ask:
    """Answers for a machine with these devices: id, type, properties."""
    places = {PERIPHERAL: named, ANONYMOUS: anonymous}

    def answer(command: Command) -> object:
        path: Any = command.arguments["path"]
        if command.name == "qom-list":
            devices = places[path]
            if devices is None:
                return CommandError("qom-list", "GenericError", "not found")
            children = [
                {"name": each, "type": f"child<{kind}>"} for each, (kind, _) in devices.items()
            ]
            return [{"name": "type", "type": "string"}, *children]
        place, _, name = path.rpartition("/")
        _, properties = (places[place] or {})[name]
        wanted: Any = command.arguments["property"]
        return properties.get(wanted, CommandError("qom-get", "GenericError", "no such property"))

    def ask(commands: Sequence[Command]) -> list[object]:
        return [answer(command) for command in commands]

    return ask


def found(ask: Ask, sysfs: Path = Path("/nowhere")) -> list[str]:
    skipped = list(holding_data(ask, sysfs))
    assert all(each.absence is Absence.IMPOSSIBLE for each in skipped)
    return [each.name for each in skipped]


@pytest.mark.parametrize(
    "kind",
    [
        "vhost-user-blk-pci",
        "vhost-user-blk-pci-non-transitional",
        "vhost-user-scsi-ccw",
        "vhost-scsi-pci",
        "vhost-vdpa-device-pci",
        "vhost-user-fs-pci",
        "virtio-9p-device",
        "usb-mtp",
        "nvdimm",
        "virtio-pmem-pci",
        "vfio-user-pci",
        "vfio-ccw",
        "tpm-tis",
        "tpm-crb",
        "tpm-spapr",
    ],
)
def test_what_holds_data_is_named(kind: str) -> None:
    assert found(machine({"x": (kind, {})})) == ["x"]
    (anonymous,) = holding_data(machine({}, {"device[0]": (kind, {})}))
    assert anonymous.name == kind
    assert "device[0]" in anonymous.aliases


@pytest.mark.parametrize(
    "kind",
    [
        "virtio-blk-pci",
        "scsi-hd",
        "vhost-user-gpu-pci",
        "vhost-vsock-pci",
        "e1000",
        "usb-kbd",
        "usb-hub",
    ],
)
def test_what_holds_none_or_is_a_block_device_is_not(kind: str) -> None:
    assert not found(machine({"x": (kind, {})}))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("0x010802", ["x"]),  # NVMe
        ("0x010601", ["x"]),  # SATA
        ("0x080501", ["x"]),  # card reader
        ("0x020000", []),  # network
        ("0x030000", []),  # graphics
        ("", ["x"]),  # unknown
    ],
)
def test_hardware_that_is_passed_through(tmp_path: Path, kind: str, names: list[str]) -> None:
    device = tmp_path / "bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    if kind:
        (device / "class").write_text(f"{kind}\n")
    vm = machine({"x": ("vfio-pci", {"host": "0000:01:00.0"})})
    assert found(vm, tmp_path) == names
    assert found(machine({"x": ("vfio-pci", {"host": "../../etc"})}), tmp_path) == ["x"]
    assert found(machine({"x": ("vfio-pci", {})}), tmp_path) == ["x"]


@pytest.mark.parametrize(("kinds", "names"), [(["03"], []), (["03", "08"], ["x"]), ([], ["x"])])
def test_usb_devices_of_the_host(tmp_path: Path, kinds: list[str], names: list[str]) -> None:
    device = tmp_path / "bus/usb/devices/1-2"
    for number, kind in enumerate(kinds):
        interface = device / f"1-2:1.{number}"
        interface.mkdir(parents=True)
        (interface / "bInterfaceClass").write_text(f"{kind}\n")
    if kinds:
        for name, value in (
            ("busnum", "1"),
            ("devnum", "7"),
            ("idVendor", "1234"),
            ("idProduct", "00ff"),
        ):
            (device / name).write_text(f"{value}\n")
    by_place = {"hostbus": 1, "hostaddr": 7, "vendorid": 0, "productid": 0}
    by_kind = {"hostbus": 0, "hostaddr": 0, "vendorid": 0x1234, "productid": 0xFF}
    for properties in (by_place, by_kind):
        assert found(machine({"x": ("usb-host", properties)}), tmp_path) == names
    elsewhere = {"hostbus": 1, "hostaddr": 8}
    assert found(machine({"x": ("usb-host", elsewhere)}), tmp_path) == ["x"]


def test_what_has_its_data_elsewhere_only_if_it_was_told_to() -> None:
    for kind, member in (("uefi-vars-x64", "jsonfile"), ("cxl-type3", "persistent-memdev")):
        assert found(machine({"x": (kind, {member: ""})})) == []
        assert found(machine({"x": (kind, {member: "/x"})})) == ["x"]
