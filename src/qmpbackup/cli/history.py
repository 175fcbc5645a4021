# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup history`: what was done for VMs."""

import argparse
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from qmpbackup.cli.printing import printable, say, say_json, table
from qmpbackup.errors import NobodyThere
from qmpbackup.plan.ages import age
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.fleet.records import Attempt

_HEAD = ("STARTED", "VM", "WHAT", "TARGET", "RESULT", "TOOK", "ADDED", "STOPPED", "WHY")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "history",
        help="show what runs did for VMs",
        description="Show what runs did, the newest first. The history may be deleted at any time: whether "
        "VMs are protected is told by their points (`status`).",
    )
    parser.add_argument("vm", nargs="?", default=None, metavar="VM", help="only this VM")
    parser.add_argument(
        "--since",
        type=_duration,
        default=timedelta(days=7),
        metavar="SPAN",
        help="how far back: a number with h, d or w, such as 3d (default: 7d)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(run=run)


def _duration(text: str) -> timedelta:
    """An `argparse` type for spans of time."""
    units = {"h": "hours", "d": "days", "w": "weeks"}
    number, unit = text[:-1], units.get(text[-1:])
    if unit is None or not (number.isascii() and number.isdigit()) or len(number) > 5:
        raise argparse.ArgumentTypeError(f"{text!r} is no span such as 12h, 3d or 2w.")
    return timedelta(**{unit: int(number)})


def run(arguments: argparse.Namespace) -> int:
    """Print what was done."""
    from qmpbackup.fleet.history import History
    from qmpbackup.state import state_folder

    with History.opened(state_folder(), read_only=True) as history:
        found = history.attempts(vm=arguments.vm, since=datetime.now(UTC) - arguments.since)
    if arguments.json:
        from qmpbackup import fleet_documents

        say_json(*map(fleet_documents.attempt, found))
        return 0
    say(*table(_HEAD, [_row(each) for each in found], right={"ADDED"}))
    if not found:
        print("Nothing was done in that time.", file=sys.stderr)
    return 0


def _row(attempt: "Attempt") -> tuple[str, ...]:
    took = attempt.ended - attempt.started if attempt.ended else None
    return (
        f"{attempt.started.astimezone():%a %d %H:%M:%S}",
        printable(attempt.vm) or "-",
        attempt.work.value,
        attempt.target,
        result(attempt.exit_code),
        age(took) if took is not None else "-",
        human(attempt.added) if attempt.added else "-",
        f"{attempt.pause * 1000:.0f} ms" if attempt.pause else "-",
        printable(attempt.reason or " ".join(filter(None, (attempt.level, attempt.point)))),
    )


def result(exit_code: int | None) -> str:
    """How something ended, in a word or two."""
    match exit_code:
        case None:
            return "goes on"
        case 0:
            return "ok"
        case 3:
            return "degraded"
        case NobodyThere.exit_code:
            return "was off"
        case _ if exit_code < 0:
            return f"killed ({-exit_code})"
    return f"exit {exit_code}"
