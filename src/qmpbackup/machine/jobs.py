# SPDX-License-Identifier: Apache-2.0
"""Block jobs: start, wait, learn how they ended, leave none behind.

Jobs are started with `auto-dismiss: false`, so the reason of a failure stays readable in
`query-jobs` until we have read it (QEMU docs/interop/live-block-operations, qapi/job.json).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from qmpbackup.errors import CommandError, CommandTimeout
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply, objects
from qmpbackup.plan.commands import Command

CREATE_SECONDS = 60.0
_EVENTS = frozenset({"JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR"})
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is, in bytes."""

    job: str
    done: int
    total: int


@dataclass(slots=True)
class JobEnd:
    """How a job ended: empty `error` is success; `operation` is `read` or `write` where QEMU told
    which side failed."""

    job: str
    error: str = ""
    operation: str = ""


Watch = Callable[[Sequence[JobProgress]], None]


@dataclass(slots=True)
class _State:
    open: set[str]
    ends: dict[str, JobEnd] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)


def wait(
    monitor: Monitor,
    jobs: Iterable[str],
    watch: Watch | None = None,
    seconds: float | None = None,
    give_up_on_error: bool = True,
) -> list[JobEnd]:
    """Wait until every job has ended, dismiss them, and say how each ended.

    With the first failure the others are cancelled: a point is whole or absent.

    Raises:
        Interrupted, ConnectionLost: see `Monitor.wait_for_event`; the jobs are left as they are.
        CommandTimeout: `seconds` went by.
    """
    names = list(jobs)
    state = _State(set(names))
    waited = 0.0
    _look(monitor, state, watch)
    while state.open:
        event = monitor.wait_for_event(_EVENTS, _POLL_SECONDS)
        if event is None:
            waited += _POLL_SECONDS
            if seconds is not None and waited > seconds:
                raise CommandTimeout(f"Jobs {', '.join(sorted(state.open))} did not end.")
        elif not _note(event, state):
            continue
        _look(monitor, state, watch)
        if give_up_on_error and any(end.error for end in state.ends.values()):
            cancel(monitor, state.open)
    return [state.ends[name] for name in names]


def cancel(monitor: Monitor, jobs: Iterable[str]) -> None:
    """Ask jobs to end at once; those that have ended already are left alone."""
    for job in jobs:
        try:
            monitor.execute(Command("job-cancel", {"id": job}))
        except CommandError:
            continue


def sweep(monitor: Monitor, jobs: Sequence[str]) -> None:
    """Cancel jobs, wait for their end and dismiss them, whatever state they are in."""
    present = {reply.text("id") for reply in _query(monitor)}
    mine = [job for job in jobs if job in present]
    cancel(monitor, mine)
    wait(monitor, mine, seconds=CREATE_SECONDS, give_up_on_error=False)


def _note(event: Reply, state: _State) -> bool:
    """Take in an event; whether it is worth asking QEMU for the state of the jobs."""
    data = event.nested("data")
    if event.text("event") == "BLOCK_JOB_ERROR":
        state.operations.setdefault(data.text("device"), data.text("operation"))
        return False
    return data.text("id") in state.open and data.text("status") in {"concluded", "null"}


def _look(monitor: Monitor, state: _State, watch: Watch | None) -> None:
    if not state.open:
        return
    progress: list[JobProgress] = []
    seen: set[str] = set()
    for reply in _query(monitor):
        job = reply.text("id")
        if job not in state.open:
            continue
        seen.add(job)
        done = JobProgress(job, reply.integer("current-progress"), reply.integer("total-progress"))
        progress.append(done)
        if reply.text("status") == "concluded":
            _end(monitor, state, job, reply.text("error", ""))
    for job in state.open - seen:
        _end(monitor, state, job, "somebody else dismissed the job")
    if watch is not None:
        watch(progress)


def _end(monitor: Monitor, state: _State, job: str, error: str) -> None:
    with suppress(CommandError):
        monitor.execute(Command("job-dismiss", {"id": job}))
    state.open = state.open - {job}
    state.ends[job] = JobEnd(job, error, state.operations.get(job, ""))


def _query(monitor: Monitor) -> Iterable[Reply]:
    return objects(monitor.execute(Command("query-jobs")), "query-jobs")
