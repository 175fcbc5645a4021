# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup restore`: bring disks of a restore point back."""

import argparse
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import (
    add_disks,
    add_lock_wait,
    add_point,
    add_reserve,
    add_target,
    add_vm,
    names,
    path,
)
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.service.restore import Outcome


DEGRADED = 3


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "restore",
        help="restore disks of a restore point",
        description="Write disks of a restore point as images into a folder, or one disk into a "
        "file or onto a block device. All that is read is proved to be what was backed up before a "
        "file gets its name; on a device nothing else is ever written.",
    )
    add = parser.add_argument
    add_target(parser)
    add_vm(parser)
    add_point(parser)
    add_disks(parser)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "-o", "--output", type=path, metavar="DIR", help="folder; each disk becomes DIR/DISK.FORMAT"
    )
    place.add_argument(
        "--output-file", type=path, metavar="FILE", help="file or block device, for one disk"
    )
    place.add_argument(
        "--vm-config",
        action="store_true",
        help="restore nothing, and print what is recorded of the VM as JSON: machine, command line, which "
        "file each disk was, and the files of its host that it needs besides",
    )
    add(
        "-f",
        "--format",
        choices=["qcow2", "raw"],
        default="",
        help="format of the images (default: qcow2; raw on a block device)",
    )
    add("--force", action="store_true", help="replace files that exist")
    add_reserve(parser)
    add("--json", action="store_true", help="print the result as one JSON object")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Restore and say what went where."""
    if arguments.vm_config:
        from qmpbackup import documents
        from qmpbackup.service import show

        point, _ = show.point(arguments.target, arguments.point, arguments.lock_wait, arguments.vm)
        say_json(documents.vm_config(point), indent=1)
        return 0
    from qmpbackup.service.restore import Request, restore

    outcome = restore(
        Request(
            target=arguments.target,
            point=arguments.point,
            disks=names(arguments.disk),
            folder=arguments.output,
            file=arguments.output_file,
            format=arguments.format,
            force=arguments.force,
            lock_wait=arguments.lock_wait,
            vm=arguments.vm,
            reserve=arguments.reserve,
        )
    )
    _print(outcome, arguments.json)
    return DEGRADED if outcome.degraded else 0


def _print(outcome: "Outcome", as_json: bool) -> None:
    if as_json:
        from qmpbackup import documents

        say_json(documents.restored(outcome))
        return
    for each in outcome.disks:
        say(printable(f"{each.disk_id:<20} {human(each.size):>10}  {each.path}"))
    point = outcome.point
    say(f"Restored point {point.id} of {point.time:%Y-%m-%d %H:%M:%S} UTC.")
    for gone in outcome.missing:
        say(printable(f"{'Degraded' if gone.degrading else 'Note'}: {gone}"))
