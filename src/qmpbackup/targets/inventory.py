# SPDX-License-Identifier: Apache-2.0
"""What any target holds: points, damage, and whose VM's they are. Pure."""

from contextlib import suppress
from dataclasses import dataclass

from qmpbackup.errors import DamagedError
from qmpbackup.model import Point, VmIdentity
from qmpbackup.plan.chain import chain


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in a target that is not as it was written; `path` is relative to the target."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """All points of a target in the order of their commits, and what could not be read.

    `marked` are backup files that an earlier command has found damaged.
    """

    points: tuple[Point, ...] = ()
    damaged: tuple[Damage, ...] = ()
    marked: tuple[Damage, ...] = ()


def known_damage(found: Inventory, point: Point) -> dict[str, tuple[str, ...]]:
    """The disks of a point that need files which are known to be damaged, and those files."""
    bad = {each.path for each in found.marked}
    needed: dict[str, tuple[str, ...]] = {}
    for disk in point.disks if bad else ():
        with suppress(DamagedError):  # what is wrong with a manifest is said elsewhere
            files = [link.disk.file for link in chain(found.points, point, disk.id)]
            if bad.intersection(files):
                needed[disk.id] = tuple(file for file in files if file in bad)
    return needed


def same_vm(one: VmIdentity, other: VmIdentity) -> bool:
    """Whether two descriptions mean one VM: by UUID, else by host and name, else by host and address.

    A host that is not known may be any.
    """
    if one.uuid and other.uuid:
        return one.uuid.lower() == other.uuid.lower()
    if one.host and other.host and one.host != other.host:
        return False
    if one.name and other.name:
        return one.name == other.name
    return one.address == other.address


def describe(identity: VmIdentity) -> str:
    """A VM in a few words, for messages."""
    parts = (identity.name, identity.uuid, identity.address)
    host = f" on {identity.host}" if identity.host else ""
    return (", ".join(part for part in parts if part) or "nameless") + host
