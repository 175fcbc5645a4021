# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup run`: what is due of all VMs of a configuration."""

import argparse
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_config
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.errors import Locked
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.fleet.run.due import Duty
    from qmpbackup.fleet.run.once import Outcome

log = logging.getLogger(__name__)


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "run",
        help="back up all VMs of a configuration that are due",
        description="Back up what is due by the schedules of the configuration, remove what its policies "
        "do not keep, and verify and drill what has not been for long. Meant for a timer that calls it every "
        "15 minutes. With names, or --all: back those VMs up now. Exit code 0: all that was due is "
        "done; 3: some of it is degraded, or could not be noted or measured; 14: some of it failed, or is switched off by a fault in the "
        "configuration; 2: the configuration cannot be used.",
    )
    parser.add_argument("vms", nargs="*", metavar="VM", help="back up this VM now; repeat")
    parser.add_argument("--all", action="store_true", help="back up all VMs now")
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what is due, and do nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object a piece of work")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run, saying what begins and what ends."""
    from qmpbackup.cli.live_table import LiveTable
    from qmpbackup.cli.run_report import COLUMNS, RunReport
    from qmpbackup.fleet.run import once

    request = once.Request(arguments.config, tuple(arguments.vms), arguments.all, arguments.dry_run)
    try:
        with LiveTable(sys.stderr, COLUMNS, is_wanted=arguments.log_format == "text") as table:
            outcome = once.run(request, RunReport(table))
    except Locked as error:
        log.info("%s Nothing was begun.", error.message)
        return 0
    for fault in outcome.faults:
        log.log(logging.WARNING if fault.is_warning else logging.ERROR, "%s", fault)
    for name in outcome.untold:
        log.error("notify.%s could not be told.", name)
    if arguments.json:
        from qmpbackup import fleet_documents

        say_json(*(fleet_documents.ran(each) for each in outcome.done))
        say_json(*(fleet_documents.due(each) for each in outcome.due))
    elif request.dry_run:
        say(*map(printable, _due_lines(outcome.due)))
    else:
        say(_summary(outcome))
    return outcome.exit_code


def _summary(outcome: "Outcome") -> str:
    final = outcome.final
    failed = sum(not each.fine for each in final)
    degraded = sum(each.fine and each.is_degraded for each in final)
    skipped = sum(each.fine and each.attempt.exit_code not in {0, 3} for each in final)
    well = len(final) - failed - degraded - skipped
    added = sum(each.attempt.added for each in final)
    if not final:
        return "Nothing is due."
    return (
        f"{len(final)} due: {well} done · {degraded} degraded · {failed} failed · {skipped} skipped. "
        f"{human(added)} added in {outcome.took.total_seconds():.0f} s."
    )


def _due_lines(due: "tuple[Duty, ...]") -> Iterator[str]:
    from qmpbackup.cli.run_report import named

    if not due:
        yield "Nothing is due."
    for each in due:
        when = f"  since {each.scheduled.astimezone():%Y-%m-%d %H:%M}" if each.scheduled else ""
        yield f"{named(each)}{when}"
