# SPDX-License-Identifier: Apache-2.0
"""What targets hold of our VMs, looked at in the targets themselves: the truth about backups.

Each place is looked at once, several at a time, by threads that nobody waits for longer than a bound:
storage that hangs holds up no judgement. Whose points are whose is told by what was seen before, by the
newest point that was made, and by the VM's socket; a VM's name need not be the one that QEMU knows.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, TypeVar

from qmpbackup import interrupt
from qmpbackup.errors import Exhausted, NoSuchTarget, QmpBackupError
from qmpbackup.fleet.config import host_name
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Attempt, Holding, Work, mark_of
from qmpbackup.fleet.settings import Configuration, TargetSettings, VmSettings, WhenGone
from qmpbackup.plan.room import Space
from qmpbackup.service import room
from qmpbackup.targets import opening
from qmpbackup.targets.overview import HeldVm, Overview

log = logging.getLogger(__name__)

PATIENCE: Final = 90.0
"""Seconds after which a place is given up that neither answers nor fails."""
_POLL_SECONDS: Final = 0.2
_AT_ONCE: Final = 8
"""Places of one target."""

T = TypeVar("T")

Variables = Callable[[TargetSettings], Mapping[str, str]]
"""Gives what a target needs in its environment to open; may fail with a `QmpBackupError`."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A target as it was found: its file system, if it is one of this machine; what is damaged there, as
    sentences, that is of no certain VM; and why nobody could look."""

    name: str
    space: Space | None = None
    damaged: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Sightings:
    """What was found: of each VM in each of its targets, and of each target."""

    holdings: tuple[Holding, ...] = ()
    sights: tuple[Sight, ...] = ()


Seen = Overview | QmpBackupError
"""What a look at one place came to."""


def look(
    configuration: Configuration,
    history: History,
    now: datetime,
    variables: Variables,
    patience: float = PATIENCE,
) -> Sightings:
    """Look at all targets, and keep what was seen in the history, if that is open to be written."""
    host = host_name()
    wanted = [
        (vm, configuration.target(name))
        for vm in configuration.vms
        if vm.enabled
        for name in vm.targets
    ]
    places = {target.place(vm, host): target for vm, target in wanted}
    seen = _seen(places, now, variables, patience)
    before = {(each.vm, each.target): each for each in history.holdings()}
    sockets = frozenset(each.socket for each in configuration.vms)
    holdings = []
    for vm, target in wanted:
        known = _known(before, vm, target, now)
        last = history.last(vm.name, target.name, Work.BACKUP, succeeded=True)
        found = seen[target.place(vm, host)]
        elsewhere = sockets - {vm.socket}
        holding = _holding(vm, target, found, Clues(host, known, last, elsewhere), now)
        holdings.append(in_order(holding, history, last))
    if not history.read_only:
        history.note(*holdings)
    return Sightings(tuple(holdings), tuple(_sights(configuration.targets, places, seen)))


def _known(
    before: Mapping[tuple[str, str], Holding], vm: VmSettings, target: TargetSettings, now: datetime
) -> Holding:
    """What was seen of a VM where its target is now; another place says nothing of this one."""
    mark = mark_of(target.place(vm, host_name()))
    known = before.get((vm.name, target.name), Holding(vm.name, target.name, now))
    if known.place not in {"", mark}:
        known = Holding(vm.name, target.name, now, host=known.host, uuid=known.uuid)
    return replace(known, place=mark)


@dataclass(frozen=True, slots=True)
class Clues:
    """By what a VM's points are known: its host, what was seen of it before, its last good backup, and the
    sockets of other VMs."""

    host: str
    known: Holding
    last: Attempt | None
    elsewhere: frozenset[str] = frozenset()


def _holding(
    vm: VmSettings, target: TargetSettings, found: Seen, clues: Clues, now: datetime
) -> Holding:
    """What a look at its place says of a VM."""
    if isinstance(found, QmpBackupError):
        if target.when_gone is WhenGone.SKIP:
            return replace(clues.known, problem="")
        if clues.known.points or not isinstance(found, NoSuchTarget):
            return replace(clues.known, problem=str(found))
        found = Overview()  # the first backup makes it
    held = whose(vm, found.vms, clues)
    if held is None:
        known = clues.known
        return Holding(
            vm.name,
            target.name,
            now,
            host=known.host,
            uuid=known.uuid,
            place=known.place,
            problem=_taken(found.vms, clues),
        )
    identity, newest = held.identity, held.newest
    return Holding(
        vm.name,
        target.name,
        now,
        newest.time if newest else None,
        newest.id if newest else "",
        newest.consistency if newest else "",
        held.points,
        held.damaged,
        identity.host,
        identity.uuid,
        ahead=held.ahead,
        place=clues.known.place,
    )


def in_order(holding: Holding, history: History, last: Attempt | None) -> Holding:
    """What is held, without a newest point that was made before the last, and dated later, by a clock that
    was wrong: such a date comes true one day, when the VM may long be without any backup."""
    if last is None or last.point == holding.newest_id:
        return holding
    made = history.made(holding.vm, holding.target, holding.newest_id)
    if made is None or made.started <= last.started:
        return holding
    return replace(holding, newest=last.started, newest_id=last.point, consistency=last.consistency)


def whose(vm: VmSettings, vms: Sequence[HeldVm], clues: Clues) -> HeldVm | None:
    """What there is of a VM among several; where several could be it, the one with the newest point."""
    for is_it in (_at_its_socket, _as_before, _by_its_name):
        found = [each for each in vms if is_it(vm, each, clues)]
        if found:
            return max(found, key=lambda each: each.newest.time.timestamp() if each.newest else 0)
    return None


def _at_its_socket(vm: VmSettings, held: HeldVm, clues: Clues) -> bool:
    """Whether the newest was made over its socket, or by its last backup."""
    identity, last = held.identity, clues.last
    if identity.address == vm.socket and identity.host in {"", clues.host}:
        return True
    return bool(held.newest and last and last.point == held.newest.id)


def _as_before(_vm: VmSettings, held: HeldVm, clues: Clues) -> bool:
    """Whether they were its own before: if it moved to another host, they still are."""
    return _has_its_uuid(held, clues) and not _is_another(held, clues)


def _by_its_name(vm: VmSettings, held: HeldVm, clues: Clues) -> bool:
    identity = held.identity
    is_here = identity.host in {"", clues.host, clues.known.host}
    return identity.name == vm.name and is_here and not _is_another(held, clues)


def _taken(vms: Iterable[HeldVm], clues: Clues) -> str:
    """That its points are another VM's now, as a sentence; empty where that is not so."""
    for each in vms:
        if _has_its_uuid(each, clues) and _is_another(each, clues):
            return (
                f"Its points were last added to by the VM at {each.identity.address}: either that is this one, "
                "renamed, or both have the same UUID, and a repository takes them for one; give one another."
            )
    return ""


def _has_its_uuid(held: HeldVm, clues: Clues) -> bool:
    known = clues.known.uuid
    return bool(known) and known.lower() == held.identity.uuid.lower()


def _is_another(held: HeldVm, clues: Clues) -> bool:
    """Whether the newest was made over the socket of another VM of this host: one that was renamed, say,
    while a new one has its name."""
    identity = held.identity
    return identity.address in clues.elsewhere and identity.host in {"", clues.host}


def _sights(
    targets: Iterable[TargetSettings],
    places: Mapping[str, TargetSettings],
    seen: Mapping[str, Seen],
) -> Iterator[Sight]:
    """What was found of each target, at all of its places."""
    for target in targets:
        found = [seen[place] for place, of in places.items() if of is target]
        overviews = [each for each in found if isinstance(each, Overview)]
        problems = [each for each in found if isinstance(each, QmpBackupError)]
        is_alarm = target.when_gone is WhenGone.FAIL and not overviews
        damaged = (damage for each in overviews for damage in each.damaged)
        yield Sight(
            target.name,
            _space(overviews),
            tuple(f"{each.path}: {each.reason}" for each in damaged),
            str(problems[0]) if problems and is_alarm else "",
        )


def _space(overviews: Iterable[Overview]) -> Space | None:
    """The file system of a target; that with the least free, where it has several."""
    spaces = []
    for each in overviews:
        if each.folder is not None:
            with suppress(OSError):
                spaces.append(room.space(each.folder))
    return min(filter(None, spaces), key=lambda each: each.free, default=None)


# Looking


def _seen(
    places: Mapping[str, TargetSettings], now: datetime, variables: Variables, patience: float
) -> dict[str, Seen]:
    """What is at each place, or why nobody knows. Each target has threads of its own: as many of its
    places as may hang, they keep nobody from looking into another."""
    done: queue.SimpleQueue[tuple[str, Seen]] = queue.SimpleQueue()

    def work(todo: queue.SimpleQueue[str]) -> None:
        with suppress(queue.Empty):
            while True:
                place = todo.get_nowait()
                done.put((place, _look_at(place, places[place], now, variables)))

    for name in {each.name for each in places.values()}:
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        its = [place for place, target in places.items() if target.name == name]
        for place in its:
            todo.put(place)
        for _ in range(min(_AT_ONCE, len(its))):
            threading.Thread(target=work, args=(todo,), name="looking", daemon=True).start()
    seen = answers(done, len(places), patience)
    late = QmpBackupError(
        f"It has not answered within {patience:.0f} s.", "See that it can be reached."
    )
    return {place: seen.get(place, late) for place in places}


def answers(done: queue.SimpleQueue[tuple[str, T]], wanted: int, patience: float) -> dict[str, T]:
    """What threads that look have found at places, until so many have, or nothing has come for a while.

    Raises:
        Interrupted: a signal is waiting.
    """
    seen: dict[str, T] = {}
    deadline = time.monotonic() + patience
    while len(seen) < wanted and time.monotonic() < deadline:
        interrupt.check()
        with suppress(queue.Empty):
            place, found = done.get(timeout=_POLL_SECONDS)
            seen[place] = found
            deadline = time.monotonic() + patience
    return seen


def _look_at(place: str, target: TargetSettings, now: datetime, variables: Variables) -> Seen:
    try:
        told = {**os.environ, **variables(target)}
        return opening.entrance(opening.place(place), told).overview(now)
    except QmpBackupError as error:
        return error
    except Exhausted as error:
        return QmpBackupError(error.message, error.hint)
    except Exception as error:  # whatever it is, the others are judged
        log.debug("Looking at %s failed:", place, exc_info=error)
        return QmpBackupError(f"Looking at it failed: {type(error).__name__}: {error}.")
