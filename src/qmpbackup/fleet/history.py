# SPDX-License-Identifier: Apache-2.0
"""What was done for VMs, and what of it people were told; it may be deleted at any time.

Nothing that can be read from a target is believed from here: a holding is what was seen there last, for
when nobody can look. Attempts are ordered by when they were entered, as clocks may leap.

A run holds a lock for as long as it lives (`running`). An attempt that has no end, and whose run holds
none, was killed: it has an exit code, and still no end.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from signal import SIGKILL
from typing import Final, Self, TypeVar

import msgspec

from qmpbackup.fleet import living
from qmpbackup.fleet.history_file import PATIENCE, HistoryFile, Row, Unreadable, Value
from qmpbackup.fleet.records import (
    OFFLINE,
    PASSED_OVER,
    SUCCEEDED,
    WAS_OFF,
    Attempt,
    Holding,
    Work,
)

KILLED: Final = -int(SIGKILL)
"""The exit code of an attempt whose run was killed."""

T = TypeVar("T")

_RUNS: Final = "runs"
_ALIVE: Final = " alive"
"""The name under which it is kept when a run was alive; no message has such a one."""
_TELL: Final = "INSERT OR REPLACE INTO told VALUES (:key, :at)"
_RAN: Final = " ran "
"""The same, of when a VM was started."""
_IMAGE: Final = " image "
"""The same, of when an image of a VM was written to last."""
_REST: Final = timedelta(days=1)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_ATTEMPT: Final = tuple(each.name for each in fields(Attempt))
_HOLDING: Final = tuple(each.name for each in fields(Holding))
_TIMES: Final = frozenset({"started", "ended", "scheduled", "looked", "newest"})

_INSERT_ATTEMPT: Final = (
    f"INSERT INTO attempt ({', '.join(_ATTEMPT)}) "
    f"VALUES ({', '.join(f':{each}' for each in _ATTEMPT)}) RETURNING key"
)
_REPLACE_ATTEMPT: Final = (
    f"INSERT OR REPLACE INTO attempt (key, {', '.join(_ATTEMPT)}) "
    f"VALUES (:key, {', '.join(f':{each}' for each in _ATTEMPT)})"
)
_SELECT_ATTEMPT: Final = f"SELECT {', '.join(_ATTEMPT)} FROM attempt WHERE "
_REPLACE_HOLDING: Final = (
    f"INSERT OR REPLACE INTO holding ({', '.join(_HOLDING)}) "
    f"VALUES ({', '.join(f':{each}' for each in _HOLDING)})"
)
_SELECT_HOLDING: Final = f"SELECT {', '.join(_HOLDING)} FROM holding ORDER BY vm, target"


class History:
    """What was done. No method fails for what becomes of its file: then `trouble` says so."""

    def __init__(self, folder: Path, file: HistoryFile, *, read_only: bool) -> None:
        self.read_only = read_only
        self._runs = folder / _RUNS
        self._file = file
        self._mine: set[str] = set()

    @classmethod
    @contextmanager
    def opened(
        cls, folder: Path, *, read_only: bool = False, patience: float = PATIENCE
    ) -> Iterator[Self]:
        """The history in a folder, which is made unless it is to be `read_only`. `patience`: seconds in
        which somebody else may keep it locked."""
        file = HistoryFile(folder, read_only=read_only, patience=patience)
        try:
            yield cls(folder, file, read_only=read_only)
        finally:
            file.close()

    @property
    def trouble(self) -> str:
        """Why nothing can be kept, or read, as a sentence; empty while all is well."""
        return self._file.trouble

    @property
    def lost(self) -> str:
        """That what was kept until now is lost, as a sentence; empty while it is not."""
        return self._file.lost

    # Runs

    @contextmanager
    def running(self, run: str) -> Iterator[None]:
        """Be the run of this id, which others see to live, for the block."""
        self._mine.add(run)
        try:
            fd = living.hold(self._runs, run)
            try:
                yield
            finally:
                if fd is not None:
                    living.let_go(self._runs, run, fd)
        finally:
            self._mine.discard(run)

    def alive(self, now: datetime) -> None:
        """Note that some run is at work, or has found that nothing is due."""
        self.tell(_ALIVE, now)

    def resume(self, now: datetime) -> None:
        """Note that runs begin again: a time in which none was alive, or over which a clock leapt, makes no
        VM that is off one that is not known any more."""
        last = self.last_alive()
        if last is not None and abs(now - last) > _REST:
            self._file.do("UPDATE known_vm SET seen = seen + :rest", {"rest": _micros(now - last)})

    def last_alive(self) -> datetime | None:
        """When a run last was."""
        return self.told(_ALIVE)

    def lives(self, run: str) -> bool:
        """Whether the run of this id goes on, as far as we may know."""
        return run in self._mine or living.lives(self._runs, run)

    # Attempts

    def begin(self, attempt: Attempt) -> int:
        """Note that something is begun; gives the key by which it is ended."""
        ((key,),) = self._file.do(_INSERT_ATTEMPT, _values(attempt))
        return _number(key)

    def end(self, key: int, attempt: Attempt) -> None:
        """Note how it ended."""
        self._file.do(_REPLACE_ATTEMPT, {"key": key, **_values(attempt)})

    def attempts(
        self,
        *,
        vm: str | None = None,
        target: str | None = None,
        work: Work | None = None,
        since: datetime | None = None,
        limit: int | None = None,
    ) -> list[Attempt]:
        """Attempts, the newest first; only those of a `vm` and so on, where that is given."""
        given = {"vm": vm, "target": target, "work": work, "since": since, "limit": limit}
        terms = [
            f"{name} = :{name}" for name in ("vm", "target", "work") if given[name] is not None
        ]
        terms += ["started >= :since"] if since is not None else []
        found = self._file.read(
            _SELECT_ATTEMPT
            + (" AND ".join(terms) or "TRUE")
            + " ORDER BY key DESC"
            + (" LIMIT :limit" if limit is not None else ""),
            {name: _stored(value) for name, value in given.items()},
            _attempt,
        )
        lives: dict[str, bool] = {}
        return [self._judged(each, lives) for each in found]

    def _judged(self, attempt: Attempt, lives: dict[str, bool]) -> Attempt:
        if attempt.ended is not None or attempt.exit_code is not None:
            return attempt
        if attempt.run not in lives:
            lives[attempt.run] = self.lives(attempt.run)
        if lives[attempt.run]:
            return attempt
        reason = "It was killed, or the host went down, before this ended."
        return replace(attempt, exit_code=KILLED, reason=reason)

    def last(self, vm: str, target: str, work: Work, *, succeeded: bool = False) -> Attempt | None:
        """The last attempt, or the last that `succeeded`; one that goes on is an attempt, too."""
        codes = f" AND exit_code IN {tuple(sorted(SUCCEEDED))}" if succeeded else ""
        found = self._file.read(
            f"{_SELECT_ATTEMPT} vm = :vm AND target = :target AND work = :work{codes} "
            "ORDER BY key DESC LIMIT 1",
            {"vm": _stored(vm), "target": _stored(target), "work": work.value},
            _attempt,
        )
        return self._judged(found[0], {}) if found else None

    def made(self, vm: str, target: str, point: str) -> Attempt | None:
        """The backup that made a point, if it was noted."""
        found = self._file.read(
            f"{_SELECT_ATTEMPT} vm = :vm AND target = :target AND point = :point "
            "ORDER BY key DESC LIMIT 1",
            {"vm": _stored(vm), "target": _stored(target), "point": _stored(point)},
            _attempt,
        )
        return found[0] if found else None

    def as_it_lies(self, vm: str, target: str) -> Attempt | None:
        """The backup of the images of a VM that is off, if it was off ever since, as far as attempts and
        starts tell: it may run by day, and be off whenever it is to be backed up."""
        for each in self.attempts(vm=vm, target=target, work=Work.BACKUP, limit=1000):
            if each.exit_code != WAS_OFF:
                is_it = each.consistency == OFFLINE and each.exit_code in SUCCEEDED
                started = self.told(_RAN + vm)
                has_run = started is not None and started > each.started
                return each if is_it and not has_run else None
        return None

    def failing(self, vm: str, target: str) -> tuple[int, datetime | None]:
        """How many backups have failed since the last that did not, and when the first of them was begun;
        those that say nothing aside."""
        count, since = 0, None
        for each in self.attempts(vm=vm, target=target, work=Work.BACKUP, limit=100):
            if each.exit_code in SUCCEEDED:
                break
            if each.exit_code is not None and each.exit_code not in PASSED_OVER:
                count, since = count + 1, each.started
        return count, since

    def failures_in_a_row(self, vm: str, target: str) -> int:
        """The count alone."""
        return self.failing(vm, target)[0]

    def ran(self, started: Mapping[str, datetime]) -> None:
        """Note when VMs that were there had been started."""
        values = [{"key": _stored(_RAN + vm), "at": _stored(at)} for vm, at in started.items()]
        self._file.do_all(_TELL, values)

    def images(self, vm: str) -> dict[str, datetime]:
        """Images of a VM, and when each had been written to as it was backed up while that was off."""
        prefix = f"{_IMAGE}{vm}\n"
        found = self._file.read(
            "SELECT key, at FROM told WHERE substr(key, 1, length(:prefix)) = :prefix",
            {"prefix": _stored(prefix)},
            lambda row: (str(row[0]), _time(row[1])),
        )
        return {key.partition("\n")[2]: at for key, at in found}

    def note_images(self, vm: str, written: Mapping[str, datetime]) -> None:
        """Keep that, in the place of what was kept before."""
        for path in self.images(vm).keys() - written.keys():
            self.tell(f"{_IMAGE}{vm}\n{path}", None)
        for path, when in written.items():
            self.tell(f"{_IMAGE}{vm}\n{path}", when)

    # What targets held

    def note(self, *holdings: Holding) -> None:
        """Keep what was seen of VMs in targets, in the place of what was seen before."""
        self._file.do_all(_REPLACE_HOLDING, [_values(each) for each in holdings])

    def holdings(self) -> list[Holding]:
        """What was seen last, of all VMs and targets."""
        return self._file.read(_SELECT_HOLDING, {}, lambda row: _record(row, _HOLDING, Holding))

    # Names

    def know(self, group: str, vms: Iterable[str], when: datetime) -> None:
        """Remember VMs that were found for a group (empty: that have a table alone), so that they are
        known while they are off, and since when."""
        self._file.do_all(
            "INSERT INTO known_vm VALUES (:group, :vm, :seen, :seen) "
            "ON CONFLICT DO UPDATE SET seen = :seen, first_seen = min(first_seen, :seen)",
            [{"group": _stored(group), "vm": _stored(vm), "seen": _stored(when)} for vm in vms],
        )

    def known_vms(self) -> dict[str, tuple[str, ...]]:
        """Names of VMs that were found before, for each group."""
        found: dict[str, list[str]] = {}
        for group, vm in self._file.do("SELECT group_name, vm FROM known_vm ORDER BY 1, 2"):
            found.setdefault(str(group), []).append(str(vm))
        return {group: tuple(vms) for group, vms in found.items()}

    def first_seen(self, vm: str) -> datetime | None:
        """When a VM was first remembered, in whichever group."""
        return next(
            iter(
                self._file.read(
                    "SELECT first_seen FROM known_vm WHERE vm = :vm ORDER BY 1 LIMIT 1",
                    {"vm": _stored(vm)},
                    lambda row: _time(row[0]),
                )
            ),
            None,
        )

    # Messages

    def told(self, key: str) -> datetime | None:
        """When people were told of something, if they were."""
        found = self._file.read(
            "SELECT at FROM told WHERE key = :key", {"key": _stored(key)}, lambda row: _time(row[0])
        )
        return found[0] if found else None

    def all_told(self) -> dict[str, datetime]:
        """All that people were told of, and when."""
        return dict(
            self._file.read(
                "SELECT key, at FROM told WHERE key NOT LIKE ' %'",
                {},
                lambda row: (str(row[0]), _time(row[1])),
            )
        )

    def tell(self, key: str, when: datetime | None) -> None:
        """Note that people were told of something; None: that it is over."""
        values = {"key": _stored(key), "at": _stored(when)}
        if when is None:
            self._file.do("DELETE FROM told WHERE key = :key", {"key": values["key"]})
        else:
            self._file.do(_TELL, values)

    def forget_before(self, when: datetime) -> None:
        """Drop what is older; of each VM and target the last success stays, whenever that was."""
        self._file.do(
            "DELETE FROM attempt WHERE started < :when AND key NOT IN (SELECT max(key) FROM attempt "
            f"WHERE exit_code IN {tuple(sorted(SUCCEEDED))} GROUP BY vm, target, work)",
            {"when": _stored(when)},
        )
        for statement in (
            "DELETE FROM holding WHERE looked < :when",
            "DELETE FROM known_vm WHERE seen < :when",
            "DELETE FROM told WHERE at < :when AND key NOT LIKE ' %'",
        ):
            self._file.do(statement, {"when": _stored(when)})
        living.bury(self._runs, self._mine)


# Values as they are stored


def _values(record: Attempt | Holding) -> dict[str, Value]:
    names = (each.name for each in fields(record))
    return {name: _stored(value) for name, value in zip(names, astuple(record), strict=True)}


def _stored(value: object) -> Value:
    match value:
        case datetime():
            return _micros(value - _EPOCH)
        case StrEnum():
            return value.value
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case int() | float() | None:
            return value
    raise TypeError(f"{value!r} is nothing that is kept")


def _micros(span: timedelta) -> int:
    return span // _MICROSECOND


def _time(value: Value) -> datetime:
    try:
        return _EPOCH + _number(value) * _MICROSECOND
    except OverflowError:
        raise Unreadable(f"{value!r} is no time") from None


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise Unreadable(f"{value!r} is no number")
    return value


def _record(row: Row, names: Iterable[str], kind: type[T]) -> T:
    """A row as what it was before it was stored.

    Raises:
        Unreadable: it is nothing that we have stored, as in a file that is broken.
    """
    members = {
        name: _time(value) if name in _TIMES and value is not None else value
        for name, value in zip(names, row, strict=True)
    }
    try:
        return msgspec.convert(members, kind)
    except msgspec.ValidationError as error:
        raise Unreadable(str(error)) from None


def _attempt(row: Row) -> Attempt:
    return _record(row, _ATTEMPT, Attempt)
