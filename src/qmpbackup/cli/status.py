# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup status`: how all VMs are protected, or what a target holds of whichever VMs."""

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_target
from qmpbackup.cli.printing import printable, say, say_json, table
from qmpbackup.plan.ages import age

if TYPE_CHECKING:
    from qmpbackup.targets.overview import HeldVm

_DAMAGED = 8


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "status",
        help="show how VMs are protected: by the age of the newest point of each",
        description="With --target: every VM of every host in it, the one with the oldest newest point "
        "first; no configuration is needed. Exit code 8 if something is known to be damaged.",
    )
    add_target(parser, "look at this target alone", required=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object a VM")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print how VMs stand."""
    return _of_target(arguments)


def _of_target(arguments: argparse.Namespace) -> int:
    from qmpbackup.cli.listing import warn
    from qmpbackup.targets import opening

    now = datetime.now(UTC)
    found = opening.entrance(arguments.target).overview(now)
    oldest_first = sorted(found.vms, key=_by_age)
    if arguments.json:
        from qmpbackup import documents

        say_json(*(documents.held(each, now) for each in oldest_first))
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
    yield (
        f"{len(vms)} VM{'s' * (len(vms) != 1)} of {len(hosts)} host{'s' * (len(hosts) != 1)}, "
        f"{points} points"
    )
    head = ("VM", "HOST", "NEWEST POINT", "AGE", "POINTS")
    yield from table(head, [_row(each, now) for each in vms], right={"AGE", "POINTS"})
    for each in vms:
        for said in _remarks(each):
            yield f"{printable(each.identity.name)}: {said}"


def _row(held: "HeldVm", now: datetime) -> tuple[str, ...]:
    identity, newest = held.identity, held.newest
    return (
        printable(identity.name or identity.address or identity.uuid),
        printable(identity.host) or "-",
        f"{newest.time:%Y-%m-%d %H:%M} UTC ({newest.consistency})" if newest else "none is good",
        age(now - newest.time) if newest else "-",
        str(held.points),
    )


def _remarks(held: "HeldVm") -> Iterator[str]:
    if held.damaged:
        yield f"damaged points: {held.damaged}"
    if held.ahead:
        yield f"points from the future: {held.ahead}. Was a clock wrong?"
