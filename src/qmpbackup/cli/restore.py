# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup restore`: bring disks of a restore point back."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import names
from qmpbackup.cli.listing import printable
from qmpbackup.cli.show import POINT_HELP
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.service.restore import Outcome


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "restore",
        help="restore disks of a restore point",
        description="Write disks of a restore point as images into a folder, or one disk into a "
        "file or onto a block device. What was written is proved to be what was backed up before a "
        "file gets its name, and before a device is written to.",
    )
    add = parser.add_argument
    add("-t", "--target", required=True, type=Path, metavar="DIR", help="where the points live")
    add("-p", "--point", default="latest", metavar="POINT", help=POINT_HELP)
    add("-d", "--disk", action="append", metavar="ID", help="only this disk; may be repeated")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder; each disk becomes DIR/DISK.FORMAT"
    )
    place.add_argument(
        "--output-file", type=Path, metavar="FILE", help="file or block device, for one disk"
    )
    add(
        "-f",
        "--format",
        choices=["qcow2", "raw"],
        default="",
        help="format of the images (default: qcow2; raw on a block device)",
    )
    add("--force", action="store_true", help="replace files that exist")
    add("--json", action="store_true", help="print the result as one JSON object")
    add("--lock-wait", type=float, default=0.0, metavar="S", help="as in backup")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Restore and say what went where."""
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
        )
    )
    _print(outcome, arguments.json)
    return 0


def _print(outcome: "Outcome", as_json: bool) -> None:
    if as_json:
        disks = [
            {"id": each.disk_id, "file": str(each.path), "size": each.size}
            for each in outcome.disks
        ]
        print(
            json.dumps({"schema": 1, "type": "restore", "point": outcome.point.id, "disks": disks})
        )
        return
    for each in outcome.disks:
        print(printable(f"{each.disk_id:<20} {human(each.size):>10}  {each.path}"))
    point = outcome.point
    print(f"Restored point {point.id} of {point.time:%Y-%m-%d %H:%M:%S} UTC.")
