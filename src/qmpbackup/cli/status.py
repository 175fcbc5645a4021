# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup status`: how all VMs are protected, or what a target holds of whichever VMs."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_config, add_target
from qmpbackup.cli.printing import printable, say, say_json, table
from qmpbackup.errors import NobodyThere, NoSuchTarget, UsageError
from qmpbackup.plan.ages import age
from qmpbackup.plan.sizes import count_of

if TYPE_CHECKING:
    from qmpbackup.fleet.standing import Standing
    from qmpbackup.fleet.survey import Survey
    from qmpbackup.targets.overview import HeldVm

_HEAD = (
    "VM",
    "TARGET",
    "STATE",
    "NEWEST POINT",
    "NEXT",
    "POINTS",
    "LAST RUN",
    "VERIFIED",
    "BOOTED",
)
_UNKNOWN = 3
_LONGEST_UNREACHED = 3600.0
_CHECKED = 10
"""VMs that one line for Nagios names."""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "status",
        help="show how VMs are protected: by the age of the newest point of each",
        description="Show how the VMs of the configuration are protected, the worst first; those that are "
        "well are only counted. With --target: every VM of every host in it, the one whose newest point is "
        "the oldest first; no configuration is needed. Exit code 8 if something in it is known to be damaged.",
    )
    parser.add_argument("vms", nargs="*", metavar="VM", help="only these VMs, well or not")
    add_config(parser)
    add_target(parser, "look at this target alone", required=False)
    parser.add_argument("--all", action="store_true", help="show those that are well, too")
    parser.add_argument(
        "--check",
        action="store_true",
        help="print one line and leave with the exit code that Nagios and its like want: 0 OK, 1 WARNING, "
        "2 CRITICAL, 3 UNKNOWN",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a VM and target")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print how VMs stand."""
    if arguments.target is not None:
        if arguments.check or arguments.vms:
            raise UsageError("--target shows all that is there.", "Leave out --check and names.")
        return _of_target(arguments)
    if not arguments.check:
        return _of_configuration(arguments)
    try:
        found = _chosen(_surveyed(arguments), arguments.vms)
    except Exception as error:  # noqa: BLE001 - whatever it is, nobody knows how the VMs stand
        say(f"QMPBACKUP UNKNOWN - {printable(str(error))}")
        return _UNKNOWN
    say(_checked(found))
    return found.severity.exit_code


def _of_configuration(arguments: argparse.Namespace) -> int:
    found = _surveyed(arguments)
    shown = _chosen(found, arguments.vms)
    if arguments.json:
        from qmpbackup import fleet_documents

        say_json(*(fleet_documents.stands(each) for each in shown.standings))
    else:
        say(*_lines(shown, everything=arguments.all or bool(arguments.vms)))
    return UsageError.exit_code if found.wrong and not found.standings else 0


def _surveyed(arguments: argparse.Namespace) -> "Survey":
    from qmpbackup.fleet import secrets
    from qmpbackup.fleet.config import load
    from qmpbackup.fleet.history import History
    from qmpbackup.fleet.survey import survey
    from qmpbackup.state import state_folder

    with History.opened(state_folder(), read_only=True) as history:
        configuration = load(arguments.config, history.known_vms())
        if not configuration.is_usable:
            wrong = [each for each in configuration.faults if not each.is_warning]
            raise UsageError(str(wrong[0]), "`qmpbackup config check` names all that is wrong.")
        return survey(configuration, history, datetime.now(UTC), secrets.environment)


def _chosen(found: "Survey", names: Sequence[str]) -> "Survey":
    """Only the VMs that are named.

    Raises:
        NoSuchTarget: one is not known.
    """
    if not names:
        return found
    for name in names:
        if not any(each.vm == name for each in found.standings):
            raise NoSuchTarget(
                f"No VM {name!r} is known.", "`qmpbackup status --all` shows those that are."
            )
    kept = tuple(each for each in found.standings if each.vm in names)
    targets = {each.target for each in kept}
    sights = tuple(each for each in found.sights if each.name in targets)
    return replace(found, standings=kept, sights=sights)


# For people


def _lines(found: "Survey", *, everything: bool) -> Iterator[str]:
    shown = [each for each in found.standings if everything or not each.is_well]
    yield _summary(found)
    rows = [_row(each, found.now) for each in shown]
    lines = table(_HEAD, rows, right={"POINTS"})
    yield from (line for line in (next(lines, ""),) if line)
    for each, line in zip(shown, lines, strict=True):
        yield line
        if each.why:
            since = f" Since {_local(each.since)}." if each.since else ""
            yield f"  └ {printable(each.why)}{since}"
    well = len(found.standings) - len(shown)
    if well:
        yield f"… {well} well (--all shows them)"
    yield from _remarks(found)


def _summary(found: "Survey") -> str:
    from qmpbackup.fleet.config import host_name
    from qmpbackup.fleet.metrics import by_state

    counted = [f"{count} {state}" for state, count in reversed(by_state(found).items()) if count]
    vms = len({each.vm for each in found.standings})
    due = [each for each in found.standings if each.next_time is not None]
    following = min(due, key=lambda each: each.next_time or found.now, default=None)
    said = f"{count_of(vms, 'VM')} on {host_name()}: {' · '.join(counted) or 'none'}"
    if following is None or following.next_time is None:
        return said
    left = age(following.next_time - found.now)
    return f"{said}       next: {printable(following.vm)} {_local(following.next_time)} (in {left})"


def _row(standing: "Standing", now: datetime) -> tuple[str, ...]:
    facts = standing.facts
    holding = facts.holding if facts else None
    newest = holding.newest if holding else None
    loud = standing.state.value if standing.is_well else standing.state.value.upper()
    verified = facts.verified.started if facts and facts.verified else None
    booted = facts.drilled.started if facts and facts.drilled else None
    kind = f" ({holding.consistency})" if holding and holding.consistency else ""
    return (
        printable(standing.vm),
        standing.target or "-",
        loud,
        f"{age(now - newest)}{kind}" if newest else "-",
        _local(standing.next_time) if standing.next_time else "-",
        str(holding.points) if holding else "-",
        _last_run(standing),
        age(now - verified) if verified else "-",
        age(now - booted) if booted else "-",
    )


def _last_run(standing: "Standing") -> str:
    facts = standing.facts
    if facts is None or facts.last is None:
        return "-"
    code = facts.last.exit_code
    if code is None:
        return "goes on"
    if code == NobodyThere.exit_code:
        return "was off"
    said = "ok" if code == 0 else f"exit {code}" if code > 0 else f"killed ({-code})"
    return f"{facts.failures} × {said}" if facts.failures > 1 else said


def _remarks(found: "Survey") -> Iterator[str]:
    from qmpbackup.targets.overview import SKEW

    for sight in found.sights:
        if sight.problem:
            yield f"target {sight.name}: {printable(sight.problem)}"
        for said in sight.damaged[:3]:
            yield f"target {sight.name}: damaged: {printable(said)}"
    if found.wrong:
        yield f"{len(found.wrong)} × wrong in the configuration: `qmpbackup config check`"
    if found.trouble:
        yield printable(found.trouble)
    if found.last_run is None:
        yield "No run has been seen here yet: is qmpbackup.timer enabled?"
    elif found.last_run - found.now > SKEW:
        yield "The last run was at a time that is yet to come: was a clock wrong?"
    elif (found.now - found.last_run).total_seconds() > _LONGEST_UNREACHED:
        yield f"The last run was {age(found.now - found.last_run)} ago: is qmpbackup.timer enabled?"


def _local(time: datetime | None) -> str:
    return f"{time.astimezone():%a %d %H:%M}" if time else "-"


# For Nagios


def _checked(found: "Survey") -> str:
    """One line, with numbers behind it."""
    from qmpbackup.fleet.metrics import by_state

    bad = [each for each in found.standings if not each.is_well]
    named = [f"{each.vm} {each.state.value}" for each in bad[:_CHECKED]]
    named += [f"and {len(bad) - _CHECKED} more"] if len(bad) > _CHECKED else []
    named += [f"target {each.name} damaged" for each in found.sights if each.damaged]
    named += ["configuration wrong"] if found.wrong else []
    named += ["history cannot be kept"] if found.trouble else []
    vms = len({each.vm for each in found.standings})
    numbers = " ".join(f"{state.value}={count}" for state, count in by_state(found).items())
    oldest = _oldest(found)
    numbers += f" oldest={oldest:.0f}s" if oldest is not None else ""
    well = f"{count_of(vms, 'VM')} well" if vms else "no VM is known: `qmpbackup config check`"
    said = printable(", ".join(named) or well).replace("|", "/")
    return f"QMPBACKUP {found.severity} - {said} | {numbers}"


def _oldest(found: "Survey") -> float | None:
    """The age of the newest point of the VM that has the oldest."""
    holdings = (each.facts.holding for each in found.standings if each.facts)
    times = [each.newest for each in holdings if each and each.newest]
    return (found.now - min(times)).total_seconds() if times else None


# One target, whatever is configured


def _of_target(arguments: argparse.Namespace) -> int:
    from qmpbackup.cli.listing import warn
    from qmpbackup.targets import opening

    now = datetime.now(UTC)
    found = opening.entrance(arguments.target).overview(now)
    oldest_first = sorted(found.vms, key=_by_age)
    if arguments.json:
        from qmpbackup import fleet_documents

        say_json(*(fleet_documents.held(each, now) for each in oldest_first))
    else:
        say(*_overview(oldest_first, now))
    return warn(found.damaged)


def _by_age(held: "HeldVm") -> tuple[float, str, str]:
    """Those without any good point first."""
    time = held.newest.time.timestamp() if held.newest else 0.0
    return time, held.identity.name, held.identity.host


def _overview(vms: "list[HeldVm]", now: datetime) -> Iterator[str]:
    hosts = {each.identity.host for each in vms}
    points = sum(each.points for each in vms)
    yield f"{count_of(len(vms), 'VM')} of {count_of(len(hosts), 'host')}, {points} points"
    head = ("VM", "HOST", "NEWEST POINT", "AGE", "POINTS")
    yield from table(head, [_held_row(each, now) for each in vms], right={"AGE", "POINTS"})
    for each in vms:
        for said in _held_remarks(each):
            yield f"{printable(each.identity.name)}: {said}"


def _held_row(held: "HeldVm", now: datetime) -> tuple[str, ...]:
    identity, newest = held.identity, held.newest
    return (
        printable(identity.name or identity.address or identity.uuid),
        printable(identity.host) or "-",
        f"{newest.time:%Y-%m-%d %H:%M} UTC ({newest.consistency})" if newest else "none is good",
        age(now - newest.time) if newest else "-",
        str(held.points),
    )


def _held_remarks(held: "HeldVm") -> Iterator[str]:
    if held.damaged:
        yield f"damaged points: {held.damaged}"
    if held.ahead:
        yield f"points from the future: {held.ahead}. Was a clock wrong?"
