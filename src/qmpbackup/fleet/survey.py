# SPDX-License-Identifier: Apache-2.0
"""All VMs of a configuration, judged: what status prints, metrics say and messages tell.

history ─┐
targets ─┼─► facts of each VM and target ─► standings, the worst first
sockets ─┘
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from qmpbackup.fleet import at_rest
from qmpbackup.fleet.history import History
from qmpbackup.fleet.looking import Sight, Sightings, Variables, look
from qmpbackup.fleet.records import WAS_OFF, Attempt, Holding, Work
from qmpbackup.fleet.settings import Configuration, Fault, VmSettings
from qmpbackup.fleet.standing import WORST_FIRST, Facts, Severity, Standing, State, judged, worst
from qmpbackup.fleet.vm_sockets import is_remote, trace
from qmpbackup.targets.overview import is_ahead


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found at one time. `trouble` is the history's own, `last_run` when a run last was alive."""

    now: datetime
    standings: tuple[Standing, ...] = ()
    sights: tuple[Sight, ...] = ()
    faults: tuple[Fault, ...] = ()
    trouble: str = ""
    last_run: datetime | None = None

    @property
    def severity(self) -> Severity:
        """The worst of all."""
        found = {each.severity for each in self.standings} or {Severity.UNKNOWN}
        found |= {Severity.CRITICAL for each in self.sights if each.damaged}
        found |= {Severity.WARNING} if self.trouble or self.wrong else set()
        return worst(frozenset(found))

    @property
    def wrong(self) -> tuple[Fault, ...]:
        """What is wrong with the configuration."""
        return tuple(each for each in self.faults if not each.is_warning)


def survey(
    configuration: Configuration, history: History, now: datetime, variables: Variables
) -> Survey:
    """Look at all targets, and judge all VMs."""
    looked = look(configuration, history, now, variables)
    return judge(configuration, history, looked, now)


def judge(
    configuration: Configuration, history: History, looked: Sightings, now: datetime
) -> Survey:
    """Judge all VMs by what was seen."""
    holdings = {(each.vm, each.target): each for each in looked.holdings}
    standings = [judged(facts, now) for facts in _facts(configuration.vms, history, holdings, now)]
    standings += _others(configuration)
    standings.sort(key=lambda each: (WORST_FIRST.index(each.state), each.vm, each.target))
    last_run = history.last_alive()
    trouble = history.trouble or history.lost  # after all that is read of it
    return Survey(now, tuple(standings), looked.sights, configuration.faults, trouble, last_run)


def _facts(
    vms: Iterable[VmSettings],
    history: History,
    holdings: dict[tuple[str, str], Holding],
    now: datetime,
) -> Iterator[Facts]:
    for vm in vms:
        if not vm.enabled:
            continue
        first_seen = history.first_seen(vm.name)
        for target in vm.targets:
            failures, since = history.failing(vm.name, target)
            last = history.last(vm.name, target, Work.BACKUP)
            yield Facts(
                vm,
                target,
                holdings.get((vm.name, target)),
                last,
                failures,
                since,
                history.last(vm.name, target, Work.VERIFY),
                history.last(vm.name, target, Work.DRILL),
                first_seen,
                is_off=is_off(vm, last, now),
                as_it_lies=at_rest.point(history, vm.name, target),
            )


def is_off(vm: VmSettings, last: Attempt | None, now: datetime) -> bool:
    """Whether a VM is off: it has no socket, or still the one at which the last backup found nobody. What a
    clock that was wrong has dated into the future says nothing of now."""
    was_off = last is not None and last.exit_code == WAS_OFF and not is_ahead(last.started, now)
    if is_remote(vm.socket):
        return was_off
    found = trace(vm.socket)
    if found.made is None:  # where nobody may look, its backup says what is wrong
        return not found.may_run
    return was_off and last is not None and found.made < last.started


def _others(configuration: Configuration) -> Iterator[Standing]:
    """What no backup is made of: VMs whose tables are wrong, and those that nobody has a table for."""
    for subject in configuration.invalid:
        kind, _, name = subject.partition(".")
        why = next(
            f"{each.key}: {each.sentence}"
            for each in configuration.faults
            if each.subject == subject and not each.is_warning
        )
        if kind == "vm":
            yield Standing(name, "", State.INVALID, why)
        else:
            yield Standing(subject, "", State.INVALID, why)
    for path in configuration.uncovered:
        yield Standing(path, "", State.UNCOVERED, "No group or vm takes it.")
