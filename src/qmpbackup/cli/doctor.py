# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup doctor`: is everything well for backups, and if not, what to do."""

import argparse

from qmpbackup.cli.arguments import add_host, add_lock_wait, add_target, path, require_socket
from qmpbackup.cli.printing import printable, say, say_json


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="look for what could go wrong with backups of this VM; changes nothing",
        description="Look at QEMU's version, disks, bitmaps, guest agent, scratch space and target, "
        "and say in one sentence each what to do. Changes nothing. Exit code 1 if something would "
        "keep a backup from working.",
    )
    add_target(parser, "also look at this target", required=False)
    parser.add_argument(
        "--scratch", type=path, metavar="DIR", help="look for room there, as in backup"
    )
    add_host(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a finding")
    add_lock_wait(parser, "VM or target")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings."""
    from qmpbackup.service.doctor import Health, examine

    worst = 0
    address = require_socket(arguments)
    findings = examine(
        address,
        arguments.agent_socket or "",
        arguments.target,
        arguments.scratch,
        arguments.lock_wait,
        arguments.host,
    )
    for finding in findings:
        worst = max(worst, int(finding.health is Health.PROBLEM))
        if arguments.json:
            from qmpbackup import documents

            say_json(documents.finding(finding))
        else:
            say(printable(f"{finding.health:<8} {finding.about}: {finding.text}"))
            if finding.todo:
                say(printable(f"{'':<8} → {finding.todo}"))
    return worst
