# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup sweep`: free what forgotten points have left in a repository."""

import argparse

from qmpbackup.cli.arguments import add_lock_wait, add_target
from qmpbackup.cli.printing import say, say_json
from qmpbackup.plan.sizes import human


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "sweep",
        help="free what forgotten points have left in a repository",
        description="Remove from a repository what no point needs any more, whichever VM's it was: what "
        "`prune --no-sweep` leaves. restic does it, and nobody else can use the repository meanwhile. "
        "In a folder, `prune` itself frees what goes.",
    )
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Sweep, and say what that has freed."""
    from qmpbackup.service.sweep import sweep

    freed = sweep(arguments.target, arguments.lock_wait)
    if arguments.json:
        from qmpbackup import documents

        say_json(documents.swept(freed))
    elif freed is None:
        say("Nothing is to be swept in a folder: `prune` frees what goes at once.")
    else:
        say(f"{human(freed)} freed.")
    return 0
