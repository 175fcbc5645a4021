# SPDX-License-Identifier: Apache-2.0
"""Whose points these are: VMs told apart, called by a name, and chosen by what a user calls them. Pure.

A VM is known by its UUID, wherever it runs and whatever it is called. One without is known by its host
and its name, or by its host and its address where it has no name either.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmpbackup.errors import NoSuchTarget, UsageError
from qmpbackup.model import VmIdentity
from qmpbackup.targets.names import folder_name

Key = tuple[str, ...]
"""What tells a VM from all others; the same of all its points."""


def key_of(identity: VmIdentity) -> Key:
    """What tells this VM from all others."""
    if identity.uuid:
        return ("uuid", identity.uuid.lower())
    if identity.name:
        return ("name", identity.host, identity.name)
    return ("address", identity.host, identity.address)


def vm_name(identity: VmIdentity) -> str:
    """What a VM is called in paths and tags: by its name, else its UUID, else its socket."""
    named = identity.name or identity.uuid
    return folder_name(named or re.sub("[^A-Za-z0-9._-]+", "-", identity.address).strip("-."))


@dataclass(frozen=True, slots=True)
class Known:
    """A VM of which a repository holds points, as the newest of them describes it; and, oldest first,
    what it was called before."""

    identity: VmIdentity
    before: tuple[VmIdentity, ...] = ()

    def __str__(self) -> str:
        named = f"{self.identity.host}/{_called(self.identity)}"
        return f"{named} ({self.identity.uuid})" if self.identity.uuid else named


def known(identities: Iterable[VmIdentity]) -> tuple[Known, ...]:
    """The VMs that these mean, which come oldest first."""
    found: dict[Key, list[VmIdentity]] = {}
    for each in identities:
        before = found.setdefault(key_of(each), [])
        if each in before:
            before.remove(each)
        before.append(each)
    return tuple(Known(each[-1], tuple(each[:-1])) for each in found.values())


def choose(vms: Sequence[Known], wanted: str, place: str) -> Known:
    """The VM that a user means by a name, a UUID, or HOST/NAME; without any, the only one.

    What it is called now counts before what it was called once.

    Raises:
        NoSuchTarget: none is meant.
        UsageError: several could be.
    """
    if not vms:
        raise NoSuchTarget(f"{place} holds no restore point.", "Make one: backup.")
    if not wanted and len(vms) > 1:
        raise UsageError(f"{place} holds several VMs: {_list(vms)}.", "Choose one with --vm.")
    found = [vm for vm in vms if not wanted or wanted in _names(vm.identity)]
    found = found or [vm for vm in vms if any(wanted in _names(each) for each in vm.before)]
    if not found:
        raise NoSuchTarget(
            f"{place} holds no point of a VM {wanted!r}.", f"It holds: {_list(vms)}."
        )
    if len(found) > 1:
        raise UsageError(
            f"{place} holds several VMs that {wanted!r} may mean: {_list(found)}.",
            "Choose one with --vm HOST/NAME or --vm UUID.",
        )
    return found[0]


def namesakes(vms: Iterable[Known], identity: VmIdentity) -> tuple[Known, ...]:
    """Other VMs that are, or were, called like this one."""
    called = vm_name(identity)
    return tuple(
        vm
        for vm in vms
        if key_of(vm.identity) != key_of(identity)
        and called in {vm_name(each) for each in (vm.identity, *vm.before)}
    )


def _called(identity: VmIdentity) -> str:
    return identity.name or identity.address or identity.uuid


def _names(identity: VmIdentity) -> set[str]:
    names = {_called(identity), vm_name(identity)}
    uuid = {identity.uuid, identity.uuid.upper(), identity.uuid.lower()} - {""}
    return names | uuid | {f"{identity.host}/{each}" for each in names}


def _list(vms: Iterable[Known]) -> str:
    return ", ".join(sorted(map(str, vms)))
