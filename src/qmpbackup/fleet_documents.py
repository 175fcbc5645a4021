# SPDX-License-Identifier: Apache-2.0
"""What `--json` prints of many VMs: values of `fleet`, as `documents` has it for those of one VM."""

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

from qmpbackup.documents import Document, document
from qmpbackup.targets.manifest import time_to_json

if TYPE_CHECKING:
    from qmpbackup.fleet.config.looking import Examined
    from qmpbackup.fleet.config.showing import ShownValue
    from qmpbackup.fleet.records import Attempt
    from qmpbackup.fleet.run.due import Duty
    from qmpbackup.fleet.run.rounds import Done
    from qmpbackup.fleet.settings import Fault
    from qmpbackup.fleet.standing import Standing
    from qmpbackup.targets.overview import HeldVm


def fault(what: "Fault") -> Document:
    """Something that is wrong with the configuration."""
    return document("fault", **asdict(what))


def configured(what: "ShownValue") -> Document:
    """A value of the configuration."""
    return document("value", **asdict(what))


def looked(what: "Examined") -> Document:
    """What was found of a VM and a target of the configuration."""
    return document(
        "looked",
        vm=what.vm,
        target=what.target,
        off=what.is_off,
        well=what.is_well,
        problem=what.problem,
        findings=list(what.findings),
    )


def ran(done: "Done") -> Document:
    """A piece of work that a run has done, or has tried; `again` is when it tries once more."""
    return document("run", **_tried(done.attempt), fine=done.fine, again=_time(done.again))


def due(duty: "Duty") -> Document:
    """A piece of work that is due."""
    return document(
        "due",
        work=duty.work.value,
        vm=duty.vm_name,
        target=duty.target.name,
        scheduled=_time(duty.scheduled),
    )


def held(what: "HeldVm", now: datetime) -> Document:
    """What a target holds of a VM; `age` is that of its newest good point, in seconds."""
    identity, newest = what.identity, what.newest
    return document(
        "held",
        vm=identity.name,
        host=identity.host,
        uuid=identity.uuid,
        newest=newest.id if newest else None,
        time=time_to_json(newest.time) if newest else None,
        age=round((now - newest.time).total_seconds(), 3) if newest else None,
        consistency=newest.consistency if newest else None,
        points=what.points,
        damaged=what.damaged,
        ahead=what.ahead,
    )


def stands(what: "Standing") -> Document:
    """How a VM is protected in a target."""
    facts = what.facts
    holding, last = (facts.holding, facts.last) if facts else (None, None)
    return document(
        "standing",
        vm=what.vm,
        target=what.target,
        state=what.state.value,
        severity=what.severity.value,
        why=what.why,
        since=_time(what.since),
        deadline=_time(what.deadline),
        next=_time(what.next_time),
        newest=holding.newest_id or None if holding else None,
        time=_time(holding.newest) if holding else None,
        points=holding.points if holding else None,
        damaged=holding.damaged if holding else None,
        failures=facts.failures if facts else 0,
        last=attempt(last) if last else None,
        verified=_time(facts.verified.started) if facts and facts.verified else None,
        drilled=_time(facts.drilled.started) if facts and facts.drilled else None,
    )


def attempt(what: "Attempt") -> Document:
    """Something that was done for a VM."""
    return document("attempt", **_tried(what), read=what.read)


def _tried(what: "Attempt") -> Document:
    return {
        "work": what.work.value,
        "vm": what.vm,
        "target": what.target,
        "scheduled": _time(what.scheduled),
        "started": _time(what.started),
        "ended": _time(what.ended),
        "exit_code": what.exit_code,
        "reason": what.reason,
        "point": what.point or None,
        "level": what.level or None,
        "consistency": what.consistency or None,
        "added": what.added,
        "pause": what.pause,
    }


def _time(time: datetime | None) -> str | None:
    return time_to_json(time) if time is not None else None
