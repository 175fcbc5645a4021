# SPDX-License-Identifier: Apache-2.0
"""Block jobs: start, wait, learn how they ended, leave none behind.

Jobs are started with `auto-dismiss: false`, so the reason of a failure stays readable in
`query-jobs` until we have read it (QEMU docs/interop/live-block-operations, qapi/job.json).

A job that ends changes the block graph, for which QEMU since 8.1 waits with its main loop, and so with
the guest, until no request is under way, a write to a scratch that hangs included. So jobs that read
views do not end by themselves: done, they are pending (`auto-finalize: false`), and they pause when
they cannot read on (`on-source-error: stop`). Who started them ends them with `sweep`, when he knows
that no scratch hangs.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from qmpbackup.errors import CommandError, CommandTimeout
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply, objects
from qmpbackup.plan.commands import Command
from qmpbackup.plan.speed import JobSpeeds

CREATE_SECONDS = 60.0
_EVENTS = frozenset({"JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR"})
_POLL_SECONDS = 1.0

_TURNS = frozenset({"paused", "pending", "concluded", "null"})
"""What a job comes to when it is done or cannot go on."""

_STOPPED = "QEMU can read it no more"
"""The reason of a job that has paused at an error of its source; QEMU keeps none."""


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is, in bytes."""

    job: str
    done: int
    total: int


@dataclass(slots=True)
class JobEnd:
    """How a job ended: empty `error` is success, or that nothing has failed yet; `operation` is `read` or
    `write` where QEMU told which side failed."""

    job: str
    error: str = ""
    operation: str = ""


Watch = Callable[[Sequence[JobProgress]], None]


@dataclass(slots=True)
class _State:
    """`stay`: the jobs neither end by themselves nor go on after an error."""

    open: set[str]
    stay: bool = False
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


def wait_until_still(
    monitor: Monitor,
    jobs: Iterable[str],
    watch: Watch | None = None,
    speeds: JobSpeeds | None = None,
) -> list[JobEnd]:
    """Wait until jobs that do not end by themselves are done, or one has failed, and say how each has
    fared until then. They are left to `sweep`. Those that run go as fast as `speeds` says, which they
    began with.

    Raises:
        Interrupted, ConnectionLost: see `Monitor.wait_for_event`.
    """
    names = list(jobs)
    state = _State(set(names), stay=True)
    _look(monitor, state, watch)
    while state.ends.keys() != set(names) and not any(end.error for end in state.ends.values()):
        if speeds is not None:
            _keep_speeds(monitor, [name for name in names if name not in state.ends], speeds)
        event = monitor.wait_for_event(_EVENTS, _POLL_SECONDS)
        if event is None or _note(event, state):
            _look(monitor, state, watch)
    return [state.ends.get(name, JobEnd(name)) for name in names]


def _keep_speeds(monitor: Monitor, running: Sequence[str], speeds: JobSpeeds) -> None:
    if speeds.changed(len(running)):
        for job in running:
            with suppress(CommandError):  # it is done meanwhile
                monitor.execute(
                    Command("block-job-set-speed", {"device": job, "speed": speeds.each})
                )


def cancel(monitor: Monitor, jobs: Iterable[str]) -> None:
    """Ask jobs to end at once; those that have ended already are left alone."""
    for job in jobs:
        try:
            monitor.execute(Command("job-cancel", {"id": job}))
        except CommandError:
            continue


def sweep(monitor: Monitor, jobs: Sequence[str]) -> None:
    """End jobs, wait for their end and dismiss them, whatever state they are in: those that are done in
    order, others by cancelling them."""
    present = {reply.text("id"): reply.text("status") for reply in _query(monitor)}
    mine = [job for job in jobs if job in present]
    for job in mine:
        if present[job] == "pending":
            with suppress(CommandError):
                monitor.execute(Command("job-finalize", {"id": job}))
        else:
            cancel(monitor, [job])
    wait(monitor, mine, seconds=CREATE_SECONDS, give_up_on_error=False)


def _note(event: Reply, state: _State) -> bool:
    """Take in an event; whether it is worth asking QEMU for the state of the jobs."""
    data = event.nested("data")
    if event.text("event") == "BLOCK_JOB_ERROR":
        state.operations.setdefault(data.text("device"), data.text("operation"))
        return False
    return data.text("id") in state.open and data.text("status") in _TURNS


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
        status = reply.text("status")
        if status == "concluded":
            _end(monitor, state, job, reply.text("error", ""))
        elif state.stay and status == "pending":
            state.ends[job] = JobEnd(job)
        elif state.stay and status == "paused" and _has_failed(monitor, job):
            state.ends[job] = JobEnd(job, _STOPPED, "read")
    for job in state.open - seen:
        _end(monitor, state, job, "somebody else dismissed the job")
    if watch is not None:
        watch(progress)


def _end(monitor: Monitor, state: _State, job: str, error: str) -> None:
    if error and job not in state.operations:  # it may have been over when we first looked
        for event in monitor.events_so_far(_EVENTS):
            _note(event, state)
    with suppress(CommandError):
        monitor.execute(Command("job-dismiss", {"id": job}))
    state.open = state.open - {job}
    state.ends[job] = JobEnd(job, error, state.operations.get(job, ""))


def _has_failed(monitor: Monitor, job: str) -> bool:
    """Whether it was an error that made a job pause, and nobody's wish."""
    what = "query-block-jobs"
    return any(
        reply.text("device") == job and reply.text("io-status") != "ok"
        for reply in objects(monitor.execute(Command(what)), what)
    )


def _query(monitor: Monitor) -> Iterable[Reply]:
    return objects(monitor.execute(Command("query-jobs")), "query-jobs")
