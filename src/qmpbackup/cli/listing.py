# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup list`: the points of a target."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpbackup.cli import printing
from qmpbackup.cli.arguments import add_lock_wait, add_target, add_vm
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.model import Point
    from qmpbackup.targets.inventory import Damage

_HEAD = ("ID", "TIME (UTC)", "LEVEL", "DISKS", "CONSISTENCY", "SIZE", "PARENT", "VM", "HOST")
_RIGHT = {"SIZE"}
_SHOWN = 5


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "list",
        help="list the restore points of a target",
        description="List the restore points of a target, oldest first. Exit code 8 if a manifest "
        "is damaged, or an earlier command has found a file damaged; all the others are listed all "
        "the same.",
    )
    add_target(parser)
    add_vm(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a point")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the points."""
    from qmpbackup.service import show
    from qmpbackup.targets.inventory import known_damage

    inventory = show.inventory(arguments.target, arguments.lock_wait, arguments.vm)
    broken = {each.id: known_damage(inventory, each) for each in inventory.points}
    if arguments.json:
        from qmpbackup import documents

        say_json(*(documents.listed(point, broken[point.id]) for point in inventory.points))
    else:
        say(*table(inventory.points))
    if not (inventory.points or inventory.damaged or arguments.json):
        print("There is no restore point yet.", file=sys.stderr)
    marked = (
        replace(each, reason=f"{each.reason.removesuffix('.')}. {_needed_by(each.path, broken)}")
        for each in inventory.marked
    )
    return warn((*inventory.damaged, *marked))


def _needed_by(file: str, broken: "Mapping[str, Mapping[str, Sequence[str]]]") -> str:
    """Which points need a damaged file, in a sentence."""
    points = [
        point for point, disks in broken.items() if any(file in files for files in disks.values())
    ]
    more = f" and {len(points) - _SHOWN} more" if len(points) > _SHOWN else ""
    return f"It is needed by {', '.join(points[:_SHOWN]) or 'no point'}{more}."


def warn(damaged: "Sequence[Damage]") -> int:
    """Name what is damaged on stderr; return the exit code that they mean."""
    import logging

    from qmpbackup.errors import DamagedError

    for damage in damaged:
        logging.getLogger("qmpbackup").warning("Damaged: %s: %s", damage.path, damage.reason)
    return DamagedError.exit_code if damaged else 0


def table(points: "Sequence[Point]") -> Iterable[str]:
    """The points for people, below a line of heads; nothing at all where there is none."""
    return printing.table(_HEAD, [_row(point) for point in points], _RIGHT)


def _row(point: "Point") -> tuple[str, ...]:
    disks = [printable(disk.shown) for disk in point.disks]
    disks += [f"({printable(each.id)} merged)" for each in point.merged]
    return (
        point.id,
        f"{point.time:%Y-%m-%d %H:%M:%S}",
        point.level,
        ",".join(disks),
        point.consistency,
        human(point.size),
        point.parent or "-",
        printable(point.vm.identity.name) or "-",
        printable(point.vm.identity.host) or "-",
    )
