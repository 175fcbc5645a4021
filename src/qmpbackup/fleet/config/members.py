# SPDX-License-Identifier: Apache-2.0
"""Which VMs there are: those that groups find, and those that have a table of their own.

A name is one VM. Two groups that find the same one are a fault of that VM alone; a table with a `socket`
of its own takes it out of all groups. Who was found before and is not there now belongs to its group
still: it is off.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from qmpbackup.fleet.config.files import Written
from qmpbackup.fleet.config.sockets import SocketPattern, is_name
from qmpbackup.fleet.settings import Fault, GroupSettings


@dataclass(frozen=True, slots=True)
class Member:
    """A VM: its name, its socket, and the group that it belongs to, if any."""

    name: str
    socket: str
    group: str = ""


@dataclass(slots=True)
class FoundVms:
    """The VMs, in the order of their names, and sockets that are left out on purpose."""

    groups: list[GroupSettings]
    vms: list[Member] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)


def found_members(
    groups: list[GroupSettings],
    own: Mapping[str, Written],
    before: Mapping[str, Collection[str]],
) -> FoundVms:
    """The VMs of these groups, and of tables of their own (`own`); `before` are names that each group
    found earlier."""
    members = FoundVms(groups)
    alone = {
        name: str(each.keys["socket"]) for name, each in own.items() if each.keys.get("socket")
    }
    claims: dict[str, list[Member]] = defaultdict(list)
    for group in groups:
        for each in _claimed(group, members.left_out):
            if each.name not in alone and each.socket not in alone.values():
                claims[each.name].append(each)
    vms = {name: Member(name, socket) for name, socket in alone.items()}
    vms |= {name: rivals[0] for name, rivals in claims.items()}
    for each in _off(groups, before):
        vms.setdefault(each.name, each)
    for name, table in own.items():
        if name not in vms:
            vms |= _unseen(name, table, groups, members.faults)
    members.faults += _disputed(claims, own)
    members.vms = sorted(vms.values(), key=lambda each: each.name)
    return members


def _claimed(group: GroupSettings, left_out: set[str]) -> Iterator[Member]:
    for name, socket in SocketPattern.parse(group.sockets).present().items():
        if _is_excepted(name, group):
            left_out.add(socket)
        else:
            yield Member(name, socket, group.name)


def _is_excepted(name: str, group: GroupSettings) -> bool:
    return any(fnmatchcase(name, each) for each in group.excepted)


def _off(groups: list[GroupSettings], before: Mapping[str, Collection[str]]) -> Iterator[Member]:
    for group in groups:
        pattern = SocketPattern.parse(group.sockets)
        for name in before.get(group.name, ()):
            if is_name(name) and not _is_excepted(name, group) and pattern.socket(name):
                yield Member(name, pattern.socket(name), group.name)


def _unseen(
    name: str, table: Written, groups: list[GroupSettings], faults: list[Fault]
) -> Mapping[str, Member]:
    """A VM that has a table without a socket, and that no group has ever found: off, where only one
    group can be meant."""
    could = [
        (group, where)
        for group in groups
        if (where := SocketPattern.parse(group.sockets).socket(name))
        and not _is_excepted(name, group)
    ]
    if len(could) == 1:
        group, where = could[0]
        said = f"group.{group.name} does not find it now: it is off, or called otherwise."
        faults.append(Fault(table.file, table.name, said, table.name, is_warning=True))
        return {name: Member(name, where, group.name)}
    said = "No group finds it, and it has no `socket` of its own."
    faults.append(Fault(table.file, table.name, said, table.name))
    return {}


def _disputed(claims: Mapping[str, list[Member]], own: Mapping[str, Written]) -> Iterator[Fault]:
    sockets: dict[str, list[Member]] = defaultdict(list)
    for each in (rival for rivals in claims.values() for rival in rivals):
        sockets[each.socket].append(each)
    for rivals in (*claims.values(), *sockets.values()):
        if len(rivals) > 1:
            groups = ", ".join(f"group.{each.group}" for each in rivals)
            names = " or ".join(dict.fromkeys(each.name for each in rivals))
            for name in dict.fromkeys(each.name for each in rivals):
                said = (
                    f"All of these find {names}; name it in `except` of all but one, or give [vm.{name}] "
                    "a `socket`."
                )
                yield Fault(own[name].file if name in own else "", groups, said, f"vm.{name}")
