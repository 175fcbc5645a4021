# SPDX-License-Identifier: Apache-2.0
"""What any target holds: points, damage, and whose VM's they are. Pure."""

from dataclasses import dataclass

from qmpbackup.model import Point, VmIdentity


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
