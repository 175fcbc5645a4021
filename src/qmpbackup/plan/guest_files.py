# SPDX-License-Identifier: Apache-2.0
"""File systems and files of a guest, as the appliance tells of them, and how users name them.

    DISK:/PATH          a file system that fills a disk       DISK:partN:/PATH   one in a partition
    VG/LV:/PATH         in a logical volume                   md/NAME:/PATH      on a RAID

Nothing here is believed of the guest's: names are bytes, numbers may be anything that a number can be.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qmpbackup.errors import UsageError, VmError

READABLE = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "exfat", "ntfs"}
    | {"iso9660", "udf", "squashfs", "erofs"}
)
"""The file systems that the appliance opens, as blkid calls them."""

LUKS = "crypto_LUKS"
_PLAIN = re.compile(rb"[A-Za-z0-9_./:+=@%^-]+\Z")
_FIELDS = 9
_LONGEST_RECORD = 16 * 1024
_SECTOR = 512
_LVM_ID = 64
_UNLOCKED = "dm CRYPT-"


@dataclass(frozen=True, slots=True)
class GuestFileSystem:
    """What was found on a disk, or in a part of it. `device` is what the appliance calls it."""

    name: str
    device: str
    type: str
    size: int
    label: str = ""
    uuid: str = ""

    @property
    def is_readable(self) -> bool:
        """Whether the appliance can open it."""
        return self.type in READABLE

    @property
    def note(self) -> str:
        """Why it cannot be opened as it is."""
        if self.is_readable:
            return ""
        if self.type == LUKS:
            return "encrypted: give the passphrase with --passphrase-file"
        if self.type.lower() == "bitlocker":
            return "encrypted by BitLocker, which cannot be opened here"
        return "no file system that can be opened here"


@dataclass(frozen=True, slots=True)
class GuestFile:
    """A file of a guest. `kind` is find's letter: f, d, l, b, c, p, s."""

    kind: str
    mode: int
    user: int
    group: int
    size: int
    time: float
    links: int
    path: bytes
    target: bytes


def quoted(word: bytes) -> bytes:
    """A word for the appliance's shell, on one line, whatever is in it but zero bytes.

    Raises:
        UsageError: there is one.
    """
    if b"\0" in word:
        raise UsageError("A path holds a zero byte.")
    if _PLAIN.match(word):
        return word
    return b"$'" + b"".join(b"\\%03o" % byte for byte in word) + b"'"


def file_systems(answer: bytes, disks: Sequence[str]) -> list[GuestFileSystem]:
    """What the appliance has found, by the disks' names in their order.

    Raises:
        VmError: it is not in the form that it should be.
    """
    fields = answer.split(b"\0")
    if len(fields) % 4 != 1 or fields[-1]:
        raise _strange()
    told_of = [
        tuple(each.decode("utf-8", "replace") for each in fields[at : at + 4])
        for at in range(0, len(fields) - 1, 4)
    ]
    told_of.sort(key=lambda each: each[1].startswith(_UNLOCKED))  # after what they are in
    names: dict[str, str] = {}
    found = []
    try:
        for device, identity, sectors, said in told_of:
            name = _name(identity, disks, names)
            names[device] = name
            told = _told(said)
            kind = told.get("TYPE", "")
            if name and kind:
                label, uuid = told.get("LABEL", ""), told.get("UUID", "")
                size = int(sectors) * _SECTOR
                found.append(GuestFileSystem(name, device, kind, size, label, uuid))
    except (ValueError, IndexError) as error:
        raise _strange() from error
    return _without_containers(found)


def _name(identity: str, disks: Sequence[str], names: Mapping[str, str]) -> str:
    """How users name a device; empty where it is not for them."""
    kind, _, rest = identity.partition(" ")
    if kind == "part":
        number, _, parent = rest.partition(" ")
        above = _name(parent, disks, names)
        return f"{above}:part{int(number)}" if above else ""
    if kind == "disk":
        return disks[int(rest.removeprefix("d"))]
    if kind == "md":
        return f"md/{rest.rpartition(':')[2]}" if rest else ""
    uuid, _, name = rest.partition(" ")
    if identity.startswith(_UNLOCKED):
        return names.get(name.removeprefix("luks-"), "")
    if uuid.startswith("LVM-") and len(uuid) == len("LVM-") + _LVM_ID:  # else a part of one
        group, _, volume = re.sub(r"(?<!-)-(?!-)", "\0", name).partition("\0")
        return f"{group}/{volume}".replace("--", "-")
    return ""


def _told(said: str) -> dict[str, str]:
    """What blkid says, in its form for `export`."""
    pairs = (line.partition("=") for line in said.splitlines())
    return {key: re.sub(r"\\(.)", r"\1", value) for key, _, value in pairs}


def _without_containers(found: Sequence[GuestFileSystem]) -> list[GuestFileSystem]:
    """Those that hold no others: of one that was unlocked, what is in it; of several disks of one btrfs,
    the first."""
    last = {each.name: each for each in found}
    seen: set[str] = set()
    kept = []
    for each in found:
        if last[each.name] is not each or each.type.endswith("_member"):
            continue
        if each.type == "btrfs" and each.uuid in seen:
            continue
        seen.add(each.uuid)
        kept.append(each)
    return kept


def split(address: str, systems: Sequence[GuestFileSystem]) -> tuple[GuestFileSystem | None, str]:
    """The file system that an address names, if it names one, and the path in it.

    Raises:
        UsageError: it names one that is not there.
    """
    if address.startswith("/"):
        return None, address
    fitting = [
        each for each in systems if address == each.name or address.startswith(f"{each.name}:")
    ]
    rests = {each.name: address[len(each.name) + 1 :] for each in fitting}
    for each in fitting:
        if rests[each.name] == "" or rests[each.name].startswith("/"):
            return each, rests[each.name] or "/"
    known = ", ".join(f"{each.name}:" for each in systems if each.is_readable)
    raise UsageError(
        f"{address} names no file system of this point.",
        f"There are: {known}; a path in one begins with a slash." if known else "",
    )


def complete(data: bytes) -> tuple[list[GuestFile], bytes]:
    """The files that are told of in the beginning of a list, and the rest that is no whole one.

    Raises:
        VmError: it is not in the form that it should be.
    """
    fields = data.split(b"\0")
    whole = (len(fields) - 1) // _FIELDS * _FIELDS
    rest = b"\0".join(fields[whole:])
    if len(rest) > _LONGEST_RECORD:
        raise _strange()
    return [_file(fields[at : at + _FIELDS]) for at in range(0, whole, _FIELDS)], rest


def _file(fields: Sequence[bytes]) -> GuestFile:
    kind, mode, user, group, size, time, links, path, target = fields
    try:
        return GuestFile(
            kind=kind.decode("ascii")[:1],
            mode=int(mode, 8),
            user=int(user),
            group=int(group),
            size=int(size),
            time=float(time),
            links=int(links),
            path=path,
            target=target,
        )
    except ValueError as error:
        raise _strange() from error


def subvolumes(answer: bytes) -> Iterator[bytes]:
    """The paths of the subvolumes of a btrfs, from `btrfs subvolume list`."""
    for line in answer.splitlines():
        found = re.match(rb"ID \d+ gen \d+ top level \d+ path (.+)\Z", line)
        if found:
            yield found[1]


def _strange() -> VmError:
    return VmError(
        "The appliance answers nothing that makes sense; what it reads may have got the better of it."
    )
