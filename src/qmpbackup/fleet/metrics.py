# SPDX-License-Identifier: Apache-2.0
"""What a survey comes to, for Prometheus: a file that node_exporter's textfile collector reads.

Values come from targets and the history, never from what a run says of itself, so that none jumps to
zero because a run fails. Deadlines are values, too: an alert needs to know no schedule.
"""

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

from qmpbackup import __version__
from qmpbackup.durable import replace_file, storage_errors
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Attempt, Work
from qmpbackup.fleet.standing import WORST_FIRST, Standing, State
from qmpbackup.fleet.survey import Survey

PREFIX: Final = "qmpbackup_"
OF_ALL: Final = {
    "build_info": "Always 1; the version is a label.",
    "config_valid": "Whether nothing is wrong with the configuration (1) or something is (0).",
    "run_timestamp_seconds": "When a run was last alive; every five minutes while one is at work.",
    "vms": "VMs by state; one with several targets counts by its worst.",
}
OF_EACH: Final = {
    "point_timestamp_seconds": "Instant of the newest point that is not known to be damaged.",
    "point_deadline_timestamp_seconds": "When the newest point is too old, or will be.",
    "points": "Restore points in the target.",
    "damaged_points": "Restore points that are known to be damaged.",
    "attempt_timestamp_seconds": "When the last backup was begun.",
    "attempt_exit_code": "Exit code of the last backup that ended; negative where a signal ended it.",
    "attempt_failures": "Backups that failed in a row.",
    "backup_duration_seconds": "How long the last backup took that succeeded.",
    "backup_pause_seconds": "For how long it stopped the VM.",
    "backup_read_bytes": "Bytes that it read.",
    "backup_added_bytes": "Bytes that it added to the target.",
    "verify_timestamp_seconds": "When the last verification was begun that succeeded.",
    "drill_timestamp_seconds": "When the last drill was begun that succeeded.",
    "drill_ready_seconds": "How long that drill took.",
}
OF_TARGETS: Final = {
    "target_free_bytes": "Free bytes on the file system of the target.",
    "target_size_bytes": "Size of the file system of the target.",
}
ALL: Final = {**OF_ALL, **OF_EACH, **OF_TARGETS}
"""Each metric, without the prefix, and what it says."""

_READABLE: Final = 0o644
"""node_exporter is another user."""


def write(path: Path, survey: Survey, history: History) -> None:
    """Put the file in its place, whole.

    Raises:
        StorageError: it cannot be written.
    """
    data = rendered(survey, history)
    with storage_errors(f"write the metrics {path}"):
        replace_file(path, data, mode=_READABLE)


def rendered(survey: Survey, history: History) -> bytes:
    """The text of the file."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()

    def gauge(name: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, ALL[name], labels, registry=registry)

    gauge("build_info", "version").labels(__version__).set(1)
    gauge("config_valid").set(not survey.wrong)
    if survey.last_run is not None:
        gauge("run_timestamp_seconds").set(survey.last_run.timestamp())
    vms = gauge("vms", "state")
    for state, count in by_state(survey).items():
        vms.labels(state.value).set(count)
    each = {name: gauge(name, "vm", "target") for name in OF_EACH}
    for standing in survey.standings:
        for name, value in _values(standing, history):
            each[name].labels(standing.vm, standing.target).set(value)
    free, size = gauge("target_free_bytes", "target"), gauge("target_size_bytes", "target")
    for sight in survey.sights:
        if sight.space is not None:
            free.labels(sight.name).set(sight.space.free)
            size.labels(sight.name).set(sight.space.total)
    return generate_latest(registry)


def by_state(survey: Survey) -> dict[State, int]:
    """How many VMs stand how; those of several targets by the worst."""
    worst: dict[str, State] = {}
    for each in survey.standings:  # the worst come first
        worst.setdefault(each.vm, each.state)
    counted = Counter(worst.values())
    return {state: counted[state] for state in WORST_FIRST}


def _values(standing: Standing, history: History) -> Iterator[tuple[str, float]]:
    """What there is to say of a VM and a target; nothing of what nobody knows."""
    facts = standing.facts
    if facts is None:
        return
    vm, target = standing.vm, standing.target
    if standing.deadline is not None:
        yield "point_deadline_timestamp_seconds", standing.deadline.timestamp()
    if facts.holding is not None:
        if facts.holding.newest is not None:
            yield "point_timestamp_seconds", facts.holding.newest.timestamp()
        yield "points", facts.holding.points
        yield "damaged_points", facts.holding.damaged
    if facts.last is not None:
        yield "attempt_timestamp_seconds", facts.last.started.timestamp()
        yield "attempt_failures", facts.failures
    if (ended := _ended(history, vm, target)) is not None:
        yield "attempt_exit_code", ended
    if (good := history.last(vm, target, Work.BACKUP, succeeded=True)) is not None:
        yield from _backup(good)
    if (verified := history.last(vm, target, Work.VERIFY, succeeded=True)) is not None:
        yield "verify_timestamp_seconds", verified.started.timestamp()
    if (drilled := history.last(vm, target, Work.DRILL, succeeded=True)) is not None:
        yield "drill_timestamp_seconds", drilled.started.timestamp()
        yield "drill_ready_seconds", _took(drilled)


def _ended(history: History, vm: str, target: str) -> int | None:
    """The exit code of the last backup that goes on no more."""
    for each in history.attempts(vm=vm, target=target, work=Work.BACKUP, limit=2):
        if each.exit_code is not None:
            return each.exit_code
    return None


def _backup(good: Attempt) -> Iterator[tuple[str, float]]:
    yield "backup_duration_seconds", _took(good)
    yield "backup_pause_seconds", good.pause
    yield "backup_read_bytes", good.read
    yield "backup_added_bytes", good.added


def _took(attempt: Attempt) -> float:
    ended: datetime = attempt.ended or attempt.started
    return (ended - attempt.started).total_seconds()
