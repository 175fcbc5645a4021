# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup prune`: remove the points that a policy does not keep."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_lock_wait, add_target, add_vm
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.errors import UsageError
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.plan.retention import Duration, Policy
    from qmpbackup.targets.removal import Removed

_COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_WHAT = {
    "last": "the newest N points",
    "hourly": "the newest point of each of the newest N hours that have one",
}


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "prune",
        help="remove the points that a policy does not keep",
        description="Remove the points that no --keep option wants; they mean what they mean to "
        "`restic forget`, in UTC. In a folder, a point that others build on is merged into the next "
        "one that stays. In a repository, restic itself forgets and sweeps. The newest point always "
        "stays.",
    )
    add_target(parser)
    add_vm(parser)
    keep = parser.add_argument_group("what to keep (N may be `unlimited`)")
    for name in _COUNTS:
        what = _WHAT.get(name, f"likewise, {name}")
        keep.add_argument(f"--keep-{name}", type=_count, default=0, metavar="N", help=what)
    keep.add_argument(
        "--keep-within",
        type=_duration,
        metavar="DURATION",
        help="all that are newer than this before the newest point: years, months, days and hours "
        "as in 1y5m7d2h",
    )
    keep.add_argument(
        "--keep-tag",
        action="append",
        type=_tags,
        default=[],
        metavar="TAG[,TAG]",
        help="(repositories) all that have these tags of restic's; may be repeated",
    )
    parser.add_argument(
        "--no-merge",
        action="store_true",
        help="(folders) merge nothing: points that others build on stay",
    )
    parser.add_argument(
        "--no-sweep",
        action="store_true",
        help="(repositories) only forget: what that leaves is freed by `sweep`, once for all VMs",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--json", action="store_true", help="print one JSON object a point")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    from qmpbackup.plan.retention import UNLIMITED

    if text in {"unlimited", str(UNLIMITED)}:
        return UNLIMITED
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a count nor `unlimited`.")


def _duration(text: str) -> "Duration":
    from qmpbackup.plan.retention import parse_duration

    try:
        return parse_duration(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _tags(text: str) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in text.split(","))


def run(arguments: argparse.Namespace) -> int:
    """Prune, and print what was kept and why, and what was removed."""
    from qmpbackup.service.prune import Request, prune

    request = Request(
        target=arguments.target,
        policy=_policy(arguments),
        vm=arguments.vm,
        merging=not arguments.no_merge,
        sweeping=not arguments.no_sweep,
        dry_run=arguments.dry_run,
        lock_wait=arguments.lock_wait,
    )
    outcome = prune(request)
    if arguments.json:
        from qmpbackup import documents

        say_json(*documents.pruned(outcome, dry_run=arguments.dry_run))
    else:
        say(*_lines(outcome, dry_run=arguments.dry_run))
    return 0


def _policy(arguments: argparse.Namespace) -> "Policy":
    from qmpbackup.plan.retention import Duration, Policy

    counts = {name: getattr(arguments, f"keep_{name}") for name in _COUNTS}
    within = arguments.keep_within or Duration()
    return Policy(**counts, within=within, tags=tuple(arguments.keep_tag))


def _lines(outcome: "Removed", *, dry_run: bool) -> Iterable[str]:
    rows = [
        (
            "keep" if each.kept else "remove",
            each.point.id,
            f"{each.point.time:%Y-%m-%d %H:%M:%S}",
            printable(", ".join(each.reasons)),
        )
        for each in reversed(outcome.verdicts)
    ]
    if rows:
        head = ("", "ID", "TIME (UTC)", "REASONS")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            yield "  ".join(cells).rstrip()
    would = "would be " if dry_run else ""
    count = f"{len(outcome.kept)} kept, {len(outcome.removed)} {would}removed"
    yield f"{count}{_freed(outcome.freed, dry_run=dry_run)}."


def _freed(freed: int | None, *, dry_run: bool) -> str:
    if freed is None:
        return ""
    if freed < 0:
        return f", {human(-freed)} more stored"
    return f", about {human(freed)} freed" if dry_run else f", {human(freed)} freed"
