# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup mount`: the disks of a point as files."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import (
    add_disks,
    add_lock_wait,
    add_point,
    add_target,
    add_vm,
    names,
    path,
)
from qmpbackup.cli.printing import printable, say
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.service.mount import Shown


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "mount",
        help="show the disks of a point as files in a folder, read-only",
        description="Show each disk of a restore point as a raw file in a folder, until a signal comes or "
        "all are unmounted. Only what somebody reads is fetched. Needs nbdfuse and fusermount3 (Debian's "
        "libnbd-bin and fuse3). What is damaged is an I/O error, as with `serve`.",
    )
    add_target(parser)
    add_vm(parser)
    add_point(parser)
    add_disks(parser)
    parser.add_argument(
        "folder", type=path, metavar="DIR", help="the folder; each disk becomes DIR/DISK.raw"
    )
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show them until the end."""
    from qmpbackup.service.mount import Request, mount

    request = Request(
        target=arguments.target,
        point=arguments.point,
        folder=arguments.folder.absolute(),
        vm=arguments.vm,
        disks=names(arguments.disk),
        lock_wait=arguments.lock_wait,
    )
    mount(request, _announce)
    return 0


def _announce(shown: "Sequence[Shown]") -> None:
    say(*(printable(f"{human(each.disk.size):>10}  {each.file}") for each in shown))
    say("Until a signal comes, or all are unmounted (fusermount3 -u FILE).")
