# SPDX-License-Identifier: Apache-2.0
"""From files to settings: each table is read alone, so that all that is wrong is said at once and with
its place; then VMs are found, and each gets its values, `defaults` < its group < its own table.

What is wrong with a table switches that table off, and no other; with one that counts for all, all.
"""

import os
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from qmpbackup.fleet.config import table
from qmpbackup.fleet.config.files import Tables, Written, gathered
from qmpbackup.fleet.config.members import FoundVms, Member, found_members
from qmpbackup.fleet.config.shapes import Row, Wrongs, read_keys
from qmpbackup.fleet.config.sockets import SocketPattern, named_like, watched
from qmpbackup.fleet.settings import (
    Configuration,
    Fault,
    Freezing,
    GroupSettings,
    NotifySettings,
    RunSettings,
    TargetSettings,
    VmSettings,
    in_place,
)
from qmpbackup.plan.guessing import or_did_you_mean

_NO_AGENT: Final = (
    "quiesce is require, and no agent is named by which file systems could be frozen."
)

NOTHING: Final[Mapping[str, Collection[str]]] = {}


def host_name() -> str:
    """What this host is called."""
    return os.environ.get("RESTIC_HOST") or socket.gethostname()


def load(path: Path, found: Mapping[str, Collection[str]] = NOTHING) -> Configuration:
    """What a file says, and those in `conf.d` beside it, for the VMs that are there now.

    `found` are names of VMs that each group found before, which may be off now. Never fails: what is
    wrong is in `faults`.
    """
    return load_all(path, found).configuration


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and the tables that it was made from."""

    configuration: Configuration
    tables: Tables


def load_all(path: Path, found: Mapping[str, Collection[str]] = NOTHING) -> Loaded:
    """The same as `load`, with what is needed to say where each value is from."""
    tables = gathered(path)
    return Loaded(_Loading(tables, found).configuration(), tables)


@dataclass(slots=True)
class _Loading:
    """Tables on their way to settings."""

    tables: Tables
    found: Mapping[str, Collection[str]]
    faults: list[Fault] = field(default_factory=list)

    def configuration(self) -> Configuration:
        """All of it."""
        self.faults += self.tables.faults
        run = RunSettings(**self._values(table.RUN, self.tables.single("run"), ""))
        metrics = self._values(table.METRICS, self.tables.single("metrics"), "")
        self._values(table.VM, self.tables.single("defaults"), "")
        targets = tuple(self._targets())
        notify = tuple(self._notify())
        members = self._members()
        vms = tuple(self._vms(members, [each.name for each in targets]))
        targets = tuple(self._led_apart(targets, vms))
        return Configuration(
            run=run,
            groups=tuple(each for each in members.groups if not self._is_off(f"group.{each.name}")),
            vms=tuple(self._with_targets(vms, targets)),
            targets=targets,
            notify=notify,
            textfile=metrics.get("textfile", ""),
            uncovered=tuple(_uncovered(run, members, vms)),
            faults=tuple(dict.fromkeys(self.faults)),
        )

    def _values(self, keys: tuple[Row, ...], written: Written, subject: str) -> dict[str, Any]:
        """What a table says; nothing where something is wrong with it."""
        wrongs: Wrongs = []
        values = read_keys(keys, written.keys, written.name, wrongs)
        wrongs += self._unknown_targets(written)
        self._note(written, wrongs, subject)
        return {} if wrongs else values

    def _note(self, written: Written, wrongs: Iterable[tuple[str, str]], subject: str) -> None:
        self.faults += (Fault(written.file, key, said, subject) for key, said in wrongs)

    def _is_off(self, name: str) -> bool:
        return any(each.subject == name and not each.is_warning for each in self.faults)

    def _unknown_targets(self, written: Written) -> Iterator[tuple[str, str]]:
        named = written.keys.get("targets")
        known = [each.own for each in self.tables.named("target")]
        for index, each in enumerate(named if isinstance(named, list) else ()):
            if isinstance(each, str) and each.strip() and each not in known:
                key = f"{written.name}.targets[{index}]"
                yield key, f"There is no [target.{each}]{or_did_you_mean(each, known)}"

    def _targets(self) -> Iterator[TargetSettings]:
        for each in self.tables.named("target"):
            values = self._values(table.TARGET, each, each.name)
            if values and not self._is_off(each.name):
                yield TargetSettings(name=each.own, **values)

    def _notify(self) -> Iterator[NotifySettings]:
        for each in self.tables.named("notify"):
            values = self._values(table.NOTIFY, each, each.name)
            if not values:
                continue
            needed = table.NEEDED[values["type"]]
            if not values[needed]:
                kind = values["type"]
                self._note(
                    each, [(f"{each.name}.{needed}", f"The type {kind} needs this.")], each.name
                )
            if not self._is_off(each.name):
                yield NotifySettings(name=each.own, **{**values, "on": frozenset(values["on"])})

    def _members(self) -> FoundVms:
        groups: list[GroupSettings] = []
        own: dict[str, Written] = {}
        for each in self.tables.named("group"):
            self._values((*table.GROUP, *table.VM), each, each.name)
            groups += _group(each)
        for each in self.tables.named("vm"):
            self._values((*table.OWN, *table.VM), each, each.name)
            own[each.own] = each
        members = found_members(groups, own, self.found)
        self.faults += members.faults
        return members

    def _vms(self, members: FoundVms, targets: list[str]) -> Iterator[VmSettings]:
        for each in members.vms:
            off = self._is_off(f"vm.{each.name}") or self._is_off(f"group.{each.group}")
            vm = None if off else self._vm(each, targets)
            if vm is not None:
                yield vm

    def _vm(self, member: Member, targets: list[str]) -> VmSettings | None:
        """A VM with all its values; none where `defaults` are wrong."""
        merged = merge(
            table.VM, *(each.keys for each in inherited(self.tables, member.name, member.group))
        )
        wrongs: Wrongs = []
        values = read_keys(table.VM, merged, "", wrongs)
        if wrongs:
            return None
        values["schedule"] = tuple(filter(None, values["schedule"]))
        values["targets"] = values["targets"] or tuple(targets)
        vm = VmSettings(name=member.name, group=member.group, socket=member.socket, **values)
        if vm.quiesce is Freezing.REQUIRE and not vm.agent:
            self._note(self._own(vm), [(f"vm.{vm.name}.agent", _NO_AGENT)], f"vm.{vm.name}")
            return None
        host = host_name()
        return replace(
            vm, agent=in_place(vm.agent, vm, host), scratch=in_place(vm.scratch, vm, host)
        )

    def _own(self, vm: VmSettings) -> Written:
        """The table that a VM is in: its own, else its group's."""
        own, group = f"vm.{vm.name}", f"group.{vm.group}"
        return self.tables.tables.get(own) or self.tables.tables[group]

    def _led_apart(
        self, targets: tuple[TargetSettings, ...], vms: tuple[VmSettings, ...]
    ) -> Iterator[TargetSettings]:
        """Targets of which no folder is that of two VMs, or of another target."""
        host, taken = host_name(), dict[str, tuple[str, str]]()
        for target in targets:
            problem = ""
            for vm in vms:
                if target.name in vm.targets and not problem:
                    place = target.place(vm, host)
                    is_folder = not place.startswith("restic:")
                    spelt = os.path.normpath(place)  # not resolved, as storage may hang
                    other = taken.setdefault(spelt, (target.name, vm.name))
                    if other[0] != target.name:
                        problem = f"{place} is that of target.{other[0]}, too."
                    elif other[1] != vm.name and is_folder:
                        problem = f"A folder is for one VM, and {other[1]} and {vm.name} would share it; write {{vm}} into it."  # fmt: skip
            if problem:
                written = self.tables.tables[f"target.{target.name}"]
                self._note(written, [(f"{written.name}.location", problem)], written.name)
            else:
                yield target

    def _with_targets(
        self, vms: Iterable[VmSettings], targets: Iterable[TargetSettings]
    ) -> Iterator[VmSettings]:
        """The VMs with those of their targets that can be used; those that have none are invalid."""
        usable = [each.name for each in targets]
        for vm in vms:
            left = tuple(each for each in vm.targets if each in usable)
            if left:
                yield replace(vm, targets=left)
            else:
                subject = f"vm.{vm.name}"
                sentence = (
                    "None of its targets can be used."
                    if vm.targets
                    else "There is no [target.NAME]."
                )
                self.faults.append(Fault(self.tables.main, subject, sentence, subject))


def _group(written: Written) -> Iterator[GroupSettings]:
    """The group of a table, where it is known which VMs it means, whatever else is wrong with it."""
    wrongs: Wrongs = []
    wanted = {each.name: each for each in table.GROUP}
    keys = {name: value for name, value in written.keys.items() if name in wanted}
    values = read_keys(table.GROUP, keys, written.name, wrongs)
    if not wrongs:
        yield GroupSettings(written.own, values["sockets"], values["excepted"])


def inherited(tables: Tables, vm: str, group: str) -> Iterator[Written]:
    """The tables that a VM has its values from, the last first in what it says."""
    yield tables.single("defaults")
    if group:
        yield tables.tables[f"group.{group}"]
    if f"vm.{vm}" in tables.tables:
        yield tables.tables[f"vm.{vm}"]


def merge(keys: tuple[Row, ...], *written: Mapping[str, Any]) -> dict[str, Any]:
    """What later tables say in place of earlier ones. A list replaces a list; of a table within, each
    key replaces its like."""
    merged: dict[str, Any] = {}
    for each in written:
        for key in keys:
            if key.name in each:
                merged[key.name] = _joined(merged.get(key.name), each[key.name])
    return merged


def _joined(before: object, value: object) -> object:
    if isinstance(before, dict) and isinstance(value, dict):
        return {**before, **value}
    return value


def _uncovered(run: RunSettings, members: FoundVms, vms: Iterable[VmSettings]) -> list[str]:
    """Sockets that are named like those of VMs, and belong to none."""
    if run.watch is None:
        globs = [SocketPattern.parse(each.sockets).alike() for each in members.groups]
        alone = (each for each in members.vms if not each.group)
        globs += filter(None, (named_like(each.socket, each.name) for each in alone))
    else:
        globs = list(run.watch)
    taken = {each.socket for each in members.vms} | members.left_out
    taken |= {each.agent for each in vms}
    return sorted(watched(globs) - taken)
