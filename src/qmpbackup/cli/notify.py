# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup notify`: tell people that a run was killed or could not begin, or try whether they hear."""

import argparse
import os
from datetime import UTC, datetime

from qmpbackup.cli.arguments import add_config
from qmpbackup.cli.printing import say
from qmpbackup.errors import QmpBackupError, UsageError


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "notify",
        help="tell people that a run has failed, or try whether they hear",
        description="Send a message by the ways that [notify] tables of the configuration say. Exit code 1 "
        "if one of them fails.",
    )
    add_config(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--test", action="store_true", help="send a test by all ways")
    what.add_argument(
        "--unit-failed",
        metavar="UNIT",
        help="say that this unit of systemd failed (for OnFailure=), unless its run has told that itself",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Send it."""
    from qmpbackup.fleet import secrets
    from qmpbackup.fleet.config import host_name, load
    from qmpbackup.fleet.history import History
    from qmpbackup.fleet.messages import telling
    from qmpbackup.fleet.messages.notices import News, Notice
    from qmpbackup.fleet.messages.telling import Scope
    from qmpbackup.fleet.settings import Event
    from qmpbackup.fleet.standing import Severity
    from qmpbackup.state import state_folder

    folder, now = state_folder(), datetime.now(UTC)
    with History.opened(folder) as history:
        configuration = load(arguments.config, history.known_vms())
        ways = telling.to_be_told(folder, configuration)
        if not ways:
            raise UsageError(
                "Nobody is to be told.", "Add a [notify.NAME] table to the configuration."
            )
        scope = Scope.TEST if arguments.test else Scope.ONE
        report = telling.tested(host_name(), now)
        if arguments.test:
            ways = tuple(map(telling.silenced, ways))
        elif _ended_in_order() and telling.has_reported(history, _invocation()):
            say("The run has told that itself.")
            return 0
        else:
            notice = Notice(Event.FAILED, arguments.unit_failed, _why(), now, Severity.CRITICAL)
            report = News(host_name(), now, (notice,), exit_code=1)
        failed = telling.tell(ways, report, history, secrets.reveal, scope=scope)
    if failed:
        raise QmpBackupError(f"Not told: {', '.join(f'notify.{each}' for each in failed)}.")
    say(f"Told: {', '.join(f'notify.{each.name}' for each in ways)}.")
    return 0


def _ended_in_order() -> bool:
    """Whether the unit ended by itself, so that its run came to tell what it had to. systemd says so to
    units of OnFailure= (systemd.exec(5), from version 251 on)."""
    return os.environ.get("MONITOR_SERVICE_RESULT", "exit-code") == "exit-code"


def _invocation() -> str:
    """Which start of the unit it is that failed."""
    return os.environ.get("MONITOR_INVOCATION_ID", "")


def _why() -> str:
    result = os.environ.get("MONITOR_SERVICE_RESULT", "")
    status = os.environ.get("MONITOR_EXIT_STATUS", "")
    said = {
        "oom-kill": "It was killed for want of memory.",
        "signal": f"It was killed by the signal {status}.",
        "timeout": "It did not end in time.",
        "watchdog": "It did not answer any more.",
        "core-dump": f"It crashed ({status}).",
        "exit-code": f"It ended with exit code {status} and has told nobody why.",
    }.get(result, "It failed.")
    return f"{said} `journalctl -u` says more. What was due may not have been backed up."
