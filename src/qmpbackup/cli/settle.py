# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup settle`: move a booted VM to local storage while it runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_lock_wait, add_reserve, path
from qmpbackup.cli.printing import printable, say, say_json

if TYPE_CHECKING:
    from qmpbackup.targets.interface import Address


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "settle",
        help="move a booted VM to local storage while it runs",
        description="Restore the disks of a booted VM beside it, every byte proved, and put the running "
        "guest on them, with all that it has written meanwhile. It stands still for a moment only, and "
        "nothing depends on the backup afterwards. After any failure or kill, run it again: it goes on.",
    )
    add_to(parser, "folder in which the VM was booted (default: that of the only booted VM)")
    add_reserve(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def add_to(parser: argparse.ArgumentParser, meaning: str) -> None:
    """The option for the folder of a booted VM."""
    parser.add_argument("--to", type=path, metavar="DIR", help=meaning)


def run(arguments: argparse.Namespace) -> int:
    """Settle the VM in a folder, or the only one."""
    from qmpbackup.service.booted import chosen

    return settle_there(chosen(arguments.to).path, arguments)


def settle_there(
    folder: Path, arguments: argparse.Namespace, target: "Address | None" = None
) -> int:
    """Settle the VM in a folder; `target` is its target, where that has been opened."""
    from qmpbackup.service.boot_folder import BootFolder
    from qmpbackup.service.settle import settle

    found = settle(
        BootFolder(folder), target=target, lock_wait=arguments.lock_wait, reserve=arguments.reserve
    )
    if arguments.json:
        from qmpbackup import documents

        say_json(documents.settled(found))
        return 0
    for disk in found.boot.disks:
        say(printable(f"{disk.id:<20} {found.folder.base(disk)}"))
    say(
        f"Nothing depends on the backup any more. The VM stood still for {found.stood_still:.3f} s."
    )
    return 0
