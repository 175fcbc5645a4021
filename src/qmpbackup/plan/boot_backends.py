# SPDX-License-Identifier: Apache-2.0
"""What stands behind devices that a guest keeps, when it is booted from a point, and what goes.

Pure: one option into another; must not know where it stands in a command line.
"""

from collections.abc import Sequence
from typing import Any

from qmpbackup.plan.qemu_options import Parameters, QemuOption, option

OF_THE_PROCESS = frozenset(
    [
        "qmp",
        "qmp-pretty",
        "monitor",
        "mon",
        "pidfile",
        "daemonize",
        "runas",
        "chroot",
        "D",
        "d",
        "incoming",
        "loadvm",
        "S",
        "add-fd",
        "gdb",
        "s",
        "snapshot",
        "sandbox",
        "run-with",
        "msg",
        "trace",
        "writeconfig",
        "debugcon",
        "accel",
        "enable-kvm",
        "display",
        "vnc",
        "spice",
        "sdl",
        "curses",
        "full-screen",
        "mem-path",
        "mem-prealloc",
        "seed",
        "icount-rr",
        "xen-attach",
        "xen-domid",
        "watchdog-action",
        "qtest",
        "qtest-log",
        "plugin",
        "preconfig",
    ]
)
"""What belongs to the process that was, not to the machine."""

IMAGES = frozenset({"hda", "hdb", "hdc", "hdd", "fda", "fdb", "cdrom", "sd", "pflash", "mtdblock"})
FILES = frozenset({"kernel", "initrd", "dtb", "bios", "L", "option-rom", "shim"})
HOST_DEVICES = (
    "vfio",
    "usb-host",
    "vhost",
    "ivshmem",
    "scsi-generic",
    "scsi-block",
    "tpm",
    "u2f-",
    "usb-mtp",
    "virtio-input-host",
    "ccid-card-",
    "igd-passthrough",
    "xen-pci",
)
HOST_OBJECTS = (
    "secret",
    "tls-creds",
    "input-",  # events of that host, or of another over the network
    "iommufd",
    "cryptodev-vhost",
    "vfio-user",
    "x-remote",
    "dbus-",
    "qtest",
    "can-",
    "colo-",
    "filter-",
    "authz",
    "pr-manager",
)


def socket_path(folder: str, identity: str) -> str:
    """Where a character device of the guest's listens: never where a monitor of ours does."""
    return f"{folder}/guest-{identity}"


def socket(folder: str, identity: str, log: str = "") -> QemuOption:
    """A character device that is a socket in a folder, and may write a log."""
    members: dict[str, Any] = {
        "backend": "socket",
        "id": identity,
        "path": socket_path(folder, identity),
        "server": "on",
        "wait": "off",
        **({"logfile": log} if log else {}),
    }
    return option("chardev", Parameters(members, implied="backend").render())


def closed_netdev(recorded: QemuOption, hub: int) -> QemuOption:
    """A network that nothing else is on."""
    members = {"type": "hubport", "id": recorded.members.text("id"), "hubid": str(hub)}
    return option("netdev", Parameters(members, implied="type").render())


def closed_nic(recorded: QemuOption, hub: int) -> QemuOption:
    """The same for `-nic`, which makes the device as well."""
    own = {"id", "model", "mac", "addr"}
    kept = {name: value for name, value in recorded.members.values.items() if name in own}
    members = {"type": "hubport", "hubid": str(hub), **kept}
    return option("nic", Parameters(members, implied="type").render())


def plain_memory(recorded: QemuOption) -> QemuOption:
    """Memory that is in no file."""
    members = recorded.members.without("mem-path", "share", "pmem", "align", "discard-data")
    return recorded.with_members(members.replaced({"qom-type": "memory-backend-ram"}))


def silent(recorded: QemuOption) -> QemuOption:
    """Sound that nobody hears."""
    members = {"driver": "none", "id": recorded.members.text("id")}
    return option("audiodev", Parameters(members, implied="driver").render())


def silent_card(recorded: QemuOption) -> QemuOption:
    """The same for `-audio`, which makes the card as well."""
    kept = {name: recorded.members.text(name) for name in ("model", "id")}
    members = {"driver": "none", **{name: value for name, value in kept.items() if value}}
    return option("audio", Parameters(members, implied="driver").render())


def accelerators(given: Sequence[QemuOption]) -> list[str]:
    """Those that were used, and emulation for a host that has none of them."""
    recorded = [each.value or "" for each in given if each.name == "accel"]
    for each in given:
        if each.name in {"machine", "M"} and each.members.text("accel"):
            recorded += each.members.text("accel").split(":")
        if each.name == "enable-kvm":
            recorded.append("kvm")
    names = [each.partition(",")[0] for each in recorded]
    return recorded if "tcg" in names else [*recorded, "tcg"]
