# SPDX-License-Identifier: Apache-2.0
"""What of a recorded command line a machine in a sandbox may have: emulated devices and plain settings.

Lists of what may be, not of what may not: a record is whatever a target holds, and a kind that is not
known here, or that a newer QEMU has, is left out and said. What stands behind the devices that stay is
replaced elsewhere (`plan.booting`).

Pure: options in, options and words out.
"""

import re
from collections.abc import Iterable

from qmpbackup.plan.qemu_options import QemuOption, option

_DEVICES = re.compile(
    r"virtio-(blk|scsi|net|serial|rng|balloon|gpu|keyboard|mouse|tablet|mem|iommu|crypto|sound)"
    r"(-pci|-device|-ccw)?(-(non-)?transitional)?"
    r"|virtio-vga|virtserialport|virtconsole"
    r"|(ide|scsi)-(hd|cd)|ahci|ich9-ahci|piix[34]-ide|isa-ide|floppy|isa-fdc|sd-card|sdhci-pci"
    r"|nvme(-ns|-subsys)?|megasas(-gen2)?|mptsas1068|lsi|lsi53c8\w+|am53c974|dc390|pvscsi"
    r"|usb-(storage|uas|bot|hub|kbd|mouse|tablet|wacom-tablet|net|serial|audio|ccid|redir|ehci)"
    r"|(nec-usb|qemu)-xhci|ich9-usb-\w+|piix[34]-usb-uhci|pci-ohci"
    r"|e1000e?|e1000-\w+|igb|i82\w+|ne2k_(isa|pci)|pcnet|rtl8139|tulip|vmxnet3"
    r"|i82801b11-bridge|ioh3420|pci-bridge|pcie-pci-bridge|pcie-root-port|pxb(-pcie)?"
    r"|x3130-upstream|xio3130-downstream"
    r"|(isa|pci)-serial(-[24]x)?|isa-parallel|isa-debugcon|isa-debug-exit|i8042|vmmouse|sga"
    r"|(secondary-)?VGA|(isa-)?cirrus-vga|isa-vga|bochs-display|qxl(-vga)?|ramfb|vmware-svga|ati-vga"
    r"|AC97|ES1370|(ich9-)?intel-hda|hda-(duplex|micro|output)|sb16|adlib|cs4231a|gus"
    r"|i6300esb|ib700|pvpanic(-pci)?|vmcoreinfo|vmgenid|intel-iommu|amd-iommu|pc-dimm|nvdimm"
    r"|isa-applesmc|smbus-ipmi|ipmi-bmc-sim|(isa|pci)-ipmi-(bt|kcs)|[\w.-]+-(x86_64|i386)-cpu",
    re.IGNORECASE,
)
_OBJECTS = frozenset(
    {
        "iothread",
        "main-loop",
        "memory-backend-file",
        "memory-backend-memfd",
        "memory-backend-ram",
        "rng-builtin",
        "rng-random",
        "thread-context",
        "throttle-group",
    }
)
_REPLACED = frozenset(
    {
        *(
            "audio",
            "audiodev",
            "blockdev",
            "cdrom",
            "chardev",
            "cpu",
            "device",
            "drive",
            "fda",
            "fdb",
        ),
        *("fsdev", "hda", "hdb", "hdc", "hdd", "M", "machine", "mtdblock", "net", "netdev", "nic"),
        *(
            "nographic",
            "object",
            "parallel",
            "pflash",
            "readconfig",
            "sd",
            "serial",
            "tpmdev",
            "virtfs",
        ),
    }
)
"""Options that `plan.booting` takes apart, each with a rule of its own."""

_SETTINGS = frozenset(
    {
        *(
            "acpitable",
            "append",
            "balloon",
            "bios",
            "boot",
            "compat",
            "dtb",
            "fw_cfg",
            "g",
            "global",
        ),
        *(
            "icount",
            "initrd",
            "k",
            "kernel",
            "L",
            "m",
            "name",
            "no-acpi",
            "no-fd-bootchk",
            "no-hpet",
        ),
        *(
            "no-user-config",
            "nodefaults",
            "numa",
            "only-migratable",
            "overcommit",
            "prom-env",
            "rtc",
        ),
        *("shim", "smbios", "smp", "soundhw", "usb", "usbdevice", "uuid", "vga", "watchdog"),
        *("win2k-hack",),
    }
)
_AT_ITS_END = frozenset({"action", "no-reboot", "no-shutdown"})
"""What QEMU does when the guest resets or powers off: in a sandbox, the first goes on, and is seen."""

_OF_THE_HOST = frozenset({"romfile", "file", "splash", "fd", "fds", "vhostfd", "filename"})
"""Members that name a file or a descriptor of the host."""


def sandboxed(
    given: Iterable[QemuOption], gone: frozenset[str]
) -> tuple[list[QemuOption], list[str]]:
    """The options that may be, and what was left out; `gone` are options that are left out in any case."""
    kept: list[QemuOption] = []
    left_out: list[str] = []
    for each in given:
        why = _refused(each)
        if each.name in gone | _AT_ITS_END:
            continue
        if why:
            left_out.append(why)
        else:
            kept.append(_without_files(each))
    return kept, left_out


def _refused(each: QemuOption) -> str:
    """Why an option may not be; empty if it may."""
    members = each.members
    if each.name == "device":
        driver = members.text("driver")
        return "" if _DEVICES.fullmatch(driver) else f"device {driver}, unknown to a sandbox"
    if each.name == "object":
        kind = members.text("qom-type")
        return "" if kind in _OBJECTS else f"object {members.text('id')} ({kind})"
    if each.name in {"fw_cfg", "smbios", "acpitable"} and _OF_THE_HOST & set(members.values):
        return f"-{each.name} {each.value}, which is a file of that host"
    if each.name == "global" and "/" in (each.value or ""):
        return f"-global {each.value}"
    if each.name in _REPLACED | _SETTINGS or not each.name:
        return ""
    return f"-{each.name}, unknown to a sandbox"


def _without_files(each: QemuOption) -> QemuOption:
    """The same without files of that host: ROMs, pictures, a source of randomness."""
    if each.name == "object" and each.members.text("qom-type") == "rng-random":
        return option("object", f"rng-builtin,id={each.members.text('id')}")
    if each.name in {"device", "boot"} and _OF_THE_HOST & set(each.members.values):
        return each.with_members(each.members.without(*_OF_THE_HOST))
    return each
