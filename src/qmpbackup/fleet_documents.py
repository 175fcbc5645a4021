# SPDX-License-Identifier: Apache-2.0
"""What `--json` prints of many VMs: values of `fleet`, as `documents` has it for those of one VM."""

from datetime import datetime
from typing import TYPE_CHECKING

from qmpbackup.documents import SCHEMA, Document
from qmpbackup.targets.manifest import time_to_json

if TYPE_CHECKING:
    from qmpbackup.fleet.records import Attempt
    from qmpbackup.fleet.standing import Standing
    from qmpbackup.targets.overview import HeldVm


def _document(kind: str, **members: object) -> Document:
    return {"schema": SCHEMA, "type": kind, **members}


def held(what: "HeldVm", now: datetime) -> Document:
    """What a target holds of a VM; `age` is that of its newest good point, in seconds."""
    identity, newest = what.identity, what.newest
    return _document(
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
    return _document(
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
    return _document(
        "attempt",
        work=what.work.value,
        vm=what.vm,
        target=what.target,
        started=_time(what.started),
        ended=_time(what.ended),
        scheduled=_time(what.scheduled),
        exit_code=what.exit_code,
        reason=what.reason,
        point=what.point or None,
        level=what.level or None,
        consistency=what.consistency or None,
        added=what.added,
        read=what.read,
        pause=what.pause,
    )


def _time(time: datetime | None) -> str | None:
    return time_to_json(time) if time is not None else None
