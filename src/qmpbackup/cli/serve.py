# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup serve`: the disks of a point as read-only NBD exports."""

import argparse
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import (
    add_disks,
    add_lock_wait,
    add_point,
    add_target,
    add_vm,
    names,
    path,
    seconds,
)
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.service.serve import Served


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "serve",
        help="serve the disks of a point over NBD, read-only",
        description="Serve each disk of a restore point as a read-only NBD export on a unix socket, for "
        "qemu-img, nbdcopy, nbdfuse, guestfish or a QEMU, until a signal ends it. Only what somebody "
        "reads is fetched. What is damaged is an I/O error, never wrong data; of a folder, files are "
        "read whole meanwhile, and a disk with a damaged one is withdrawn (exit 8).",
    )
    add_target(parser)
    add_vm(parser)
    add_point(parser)
    add_disks(parser)
    parser.add_argument(
        "--socket",
        dest="listen",
        type=path,
        metavar="PATH",
        help="the socket (default: one in the folder of this user's locks)",
    )
    parser.add_argument(
        "--until-idle",
        type=seconds,
        metavar="S",
        help="end when nobody has been connected for so long",
    )
    parser.add_argument(
        "--allocation",
        action="store_true",
        help="also tell which blocks are zeros (base:allocation), which speeds tools that copy; not for "
        "a QEMU that runs a guest from it, which would read wrong data once the server is gone",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what is served as one JSON object, once it is"
    )
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until the end."""
    from qmpbackup.service.serve import Request, serve

    request = Request(
        target=arguments.target,
        point=arguments.point,
        vm=arguments.vm,
        disks=names(arguments.disk),
        socket=arguments.listen,
        until_idle=arguments.until_idle,
        allocation=arguments.allocation,
        lock_wait=arguments.lock_wait,
    )
    serve(request, _as_json if arguments.json else _as_text)
    return 0


def _as_text(served: "Served") -> None:
    from qmpbackup.documents import export_uri

    say(printable(f"Point {served.point.id}, until a signal comes:"))
    for disk in served.disks:
        say(printable(f"{human(disk.size):>10}  {export_uri(served, disk)}"))
    if not served.proved:
        say("The files are being read whole meanwhile; what is damaged is withdrawn.")


def _as_json(served: "Served") -> None:
    from qmpbackup import documents

    say_json(documents.served(served))
