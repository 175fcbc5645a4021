# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup init`: make a restic repository."""

import argparse
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import place
from qmpbackup.cli.printing import printable, say, say_json

if TYPE_CHECKING:
    from qmpbackup.service.init import Made


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "init",
        help="make a restic repository for backups",
        description="Make a new restic repository, as `restic init` does. Location and password are "
        "taken as restic takes them: RESTIC_PASSWORD, RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND, "
        "or asked for on a terminal. Without the password nothing can ever be restored: keep it "
        "in a safe place besides this machine. (A folder as a target needs no init.)",
    )
    parser.add_argument(
        "-t",
        "--target",
        required=True,
        type=place,
        metavar="restic:LOCATION",
        help="such as restic:/backup/repository, restic:rest:https://host/, or "
        "restic:s3:https://host/bucket; restic: alone means RESTIC_REPOSITORY",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make it."""
    from qmpbackup.service.init import init

    _print(init(arguments.target), arguments.json)
    return 0


def _print(made: "Made", as_json: bool) -> None:
    if as_json:
        from qmpbackup import documents

        say_json(documents.made(made))
    else:
        say(printable(f"Made the repository {made.id[:10]} at {made.location}."))
