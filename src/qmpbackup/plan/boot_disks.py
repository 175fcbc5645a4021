# SPDX-License-Identifier: Apache-2.0
"""The disks of a recorded command line: which of its drives and nodes are which disks of a point.

Pure: knows what was recorded; must not know what is made of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmpbackup.plan.qemu_options import Parameters, QemuOption

OVERLAY = ".overlay.qcow2"
"""How the file ends that a booted VM writes to; the disk without it, once it is settled, in `.qcow2`."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A disk of the point, the file it was on, and the node it is put on, as `blockdev-add` takes it;
    `below` are nodes that are there before."""

    id: str
    source_file: str
    node: Mapping[str, Any]
    below: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """The name of the node."""
        return str(self.node["node-name"])


class RecordedDisks:
    """Drives and nodes as they were given to QEMU, and the disks of the point that they are."""

    def __init__(
        self,
        given: Iterable[QemuOption],
        disks: Sequence[Attached],
        is_here: Callable[[str], bool],
    ) -> None:
        options = list(given)
        self._disks = disks
        self._is_here = is_here
        self._nodes = {
            each.members.text("node-name"): each.members
            for each in options
            if each.name == "blockdev"
        }
        self.drives = {
            each.members.text("id"): each.members for each in options if each.name == "drive"
        }
        self.kept_nodes = {
            below
            for name in _heads(options) & self._nodes.keys()
            if is_read_only(self._nodes[name]) and self.attached("", name) is None
            if self._nodes_may_stay(name, is_firmware=name in _heads(options, _FIRMWARE))
            for below in self._under(name)
            if self.attached("", below) is None
        }
        """Nodes that stay: of what a device only reads, and is in no point. Images below a disk of the
        point are not among them: all of what they hold is in the point, and they may be gone."""
        self.kept_drives = {
            name
            for name, members in self.drives.items()
            if is_read_only(members) and self.may_stay(members)
        }
        """The same for `-drive`."""

    def may_stay(self, members: Parameters, *, is_firmware: bool = False) -> bool:
        """Whether a drive that is only read may be as recorded: nothing, or a plain file that is here.
        Without its firmware, a machine is another one, so whether that is here is for others to see."""
        file = file_in(members)
        if not _is_plain(members):
            return False
        return not file or is_firmware or self._is_here(file)

    def _nodes_may_stay(self, name: str, *, is_firmware: bool) -> bool:
        return all(
            self.may_stay(self._nodes[each], is_firmware=is_firmware) for each in self._under(name)
        )

    def _under(self, name: str) -> set[str]:
        """A recorded node and those below it."""
        members = self._nodes.get(name)
        found = {name} if members else set()
        for value in members.values.values() if members else ():
            if isinstance(value, str) and value in self._nodes and value != name:
                found |= self._under(value)
        return found

    def file_of(self, drive: str) -> str:
        """The file that a recorded node or drive is on."""
        if drive in self.drives:
            return file_in(self.drives[drive])
        found = (file_in(self._nodes[name]) for name in self._under(drive))
        return next(filter(None, found), "")

    def attached(self, device: str, drive: str, file: str = "") -> Attached | None:
        """The disk of the point that a device with this id on this node or drive is."""
        for each in self._disks:
            if each.id in {device, drive} - {""}:
                return each
        file = file or self.file_of(drive)
        # Of a VM that was booted and settled, the command line names the overlay that is no more.
        settled = file.removesuffix(OVERLAY) + ".qcow2" if file.endswith(OVERLAY) else file
        return next(
            (each for each in self._disks if file and each.source_file in {file, settled}), None
        )


_FIRMWARE = ("pflash0", "pflash1")
_PLAIN_DRIVERS = frozenset({"", "file", "raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx"})
_NAMES_MORE = frozenset({"backing", "data-file", "key-secret", "server", "path", "host", "url"})


def _is_plain(members: Parameters) -> bool:
    """Whether a recorded node or drive is a file and nothing else: no device, no server, nothing below."""
    inner = [each for each in members.values.values() if isinstance(each, Mapping)]
    if not all(_is_plain(Parameters(each)) for each in inner):
        return False
    drivers = {members.text(name) for name in ("driver", "format", "file.driver")}
    told = {part for name, value in members.values.items() if value for part in name.split(".")}
    named = file_in(members)
    return (
        drivers <= _PLAIN_DRIVERS
        and not told & _NAMES_MORE
        and (named.startswith("/") or ":" not in named)
    )


def _heads(
    options: Iterable[QemuOption], members: Sequence[str] = ("drive", *_FIRMWARE)
) -> set[str]:
    """The nodes that devices and the machine name."""
    return {
        each.members.text(member)
        for each in options
        if each.name in {"device", "machine", "M"}
        for member in members
    }


def file_in(members: Parameters) -> str:
    """The file that one node or drive names."""
    inner = members.values.get("file")
    if isinstance(inner, Mapping):
        return str(inner.get("filename", ""))
    named = members.text("filename") or members.text("file.filename")
    return named or (members.text("file") if "node-name" not in members.values else "")


def flattened(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options of a node as `-drive` takes them, which knows neither JSON nor names of nodes there."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            text = (
                {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
            )
            found[prefix + name] = text
    return found


def is_read_only(members: Parameters) -> bool:
    """Whether a recorded node or drive is only read."""
    return (
        any(members.values.get(name) in ("on", True) for name in ("read-only", "readonly"))
        or members.text("media") == "cdrom"
    )
