# SPDX-License-Identifier: Apache-2.0
"""`qmprebase` and `qmprestore`: the original tool's commands on the folder of one disk."""

import argparse
from typing import TYPE_CHECKING

from qmpbackup import __version__
from qmpbackup.cli.arguments import Parser, add_lock_wait, add_shared_options, path, size
from qmpbackup.cli.printing import printable, say

if TYPE_CHECKING:
    from qmpbackup.plan.merge import Operation
    from qmpbackup.service.original.choosing import Request

_EPILOG = """\
To restore without changing the backup at all, use `qmpbackup restore`.

exit codes:
  0 done · 1 failed · 2 wrong usage · 7 storage, or no room · 8 damaged data · 10 no such folder
  11 locked by another run · 129/130/143 interrupted"""


def qmprebase_parser() -> argparse.ArgumentParser:
    """The command line of `qmprebase`."""
    parser = _parser("qmprebase", "Merge the backup of a disk into its full, in place.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "rebase",
        help="merge the chain into its FULL, which then holds the newest state",
        description="Merge the images of a disk into its FULL, up to the newest or the one given. "
        "The FULL then holds that state and stands alone; the merged INC files are removed, once the "
        "result has been compared with them.",
    )
    _add_shared(command)
    _add_dry_run(command)
    command.set_defaults(run=_commit)
    return parser


def qmprestore_parser() -> argparse.ArgumentParser:
    """The command line of `qmprestore`."""
    parser = _parser("qmprestore", "Link, merge or export the backup of a disk.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "rebase",
        help="link the images, and leave the link `image` to the newest; merges nothing",
        description="Make sure that each image names the one it builds on, and leave a symbolic link "
        "`image` to the newest (or the one given). Nothing is merged.",
    )
    _add_shared(command)
    _add_dry_run(command)
    command.set_defaults(run=_link)
    command = commands.add_parser(
        "commit",
        help="merge the chain into its FULL, in place",
        description="Merge the images of a disk into its FULL, which then holds the newest state (or "
        "the one given) and stands alone. Earlier states end.",
    )
    _add_shared(command)
    _add_dry_run(command)
    command.set_defaults(run=_commit)
    command = commands.add_parser(
        "merge",
        help="write the state into a new file; leaves the backup alone",
        description="Write the newest state (or the one given) into a new qcow2 file.",
    )
    _add_shared(command)
    command.add_argument(
        "--targetfile", required=True, type=path, metavar="F", help="the file to write"
    )
    command.set_defaults(run=_export)
    command = commands.add_parser(
        "snapshotrebase",
        help="merge the chain into its FULL, in place, and keep each state as a snapshot in it",
        description="Merge the images of a disk into its FULL, in which each state is kept as an "
        "internal snapshot: FULL-BACKUP, and one for each INC, called after its time (UTC).",
    )
    _add_shared(command)
    _add_dry_run(command)
    command.set_defaults(run=_snapshots)
    return parser


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=program,
        description=description,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    add_shared_options(parser)
    _add_skip_check(parser, default=False)
    return parser


def _add_skip_check(parser: argparse.ArgumentParser, *, default: bool | str) -> None:
    parser.add_argument(
        "--skip-check",
        action="store_true",
        default=default,
        help="do not read all files first to prove that they are whole",
    )


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", required=True, type=path, metavar="DIR", help="folder with the images of a disk"
    )
    parser.add_argument(
        "--until", default="", metavar="F", help="the image whose state is meant (default: newest)"
    )
    parser.add_argument(
        "--filter",
        default="",
        metavar="TEXT",
        help="only images whose name contains this, where several disks share a folder",
    )
    parser.add_argument(
        "--rate-limit", type=size, default=0, metavar="N", help="bytes a second, also 50M"
    )
    add_lock_wait(parser)
    # Before the command or behind it: a default here would undo what stood before.
    _add_skip_check(parser, default=argparse.SUPPRESS)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show the steps, change nothing")


def _request(arguments: argparse.Namespace) -> "Request":
    from qmpbackup.service.original.choosing import Request

    return Request(
        folder=arguments.dir,
        until=arguments.until,
        containing=arguments.filter,
        skip_check=arguments.skip_check,
        rate=arguments.rate_limit,
        lock_wait=arguments.lock_wait,
    )


def _commit(arguments: argparse.Namespace) -> int:
    from qmpbackup.plan.merge import Operation

    return _merge(arguments, Operation.COMMIT)


def _snapshots(arguments: argparse.Namespace) -> int:
    from qmpbackup.plan.merge import Operation

    return _merge(arguments, Operation.SNAPSHOTS)


def _merge(arguments: argparse.Namespace, operation: "Operation") -> int:
    from qmpbackup.service.original import merge

    if arguments.dry_run:
        return _print(merge.dry_run(_request(arguments), operation).lines())
    plan = merge.merge(_request(arguments), operation).plan
    if not plan.superseded:
        return _print(plan.lines())
    lines = [f"{arguments.dir / plan.base} holds the state of {plan.newest}"]
    return _print([*lines, *(f"snapshot {tag.name}: the state of {tag.file}" for tag in plan.tags)])


def _link(arguments: argparse.Namespace) -> int:
    from qmpbackup.plan.merge import SYMLINK
    from qmpbackup.service.original import link

    if arguments.dry_run:
        return _print(link.dry_run(_request(arguments)).lines())
    plan = link.link(_request(arguments))
    return _print([f"{arguments.dir / SYMLINK} leads to {plan.newest}"])


def _export(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.original.export import export

    newest = export(_request(arguments), arguments.targetfile)
    return _print([f"{arguments.targetfile} holds the state of {newest}"])


def _print(lines: "list[str] | tuple[str, ...]") -> int:
    say(*map(printable, lines))
    return 0
