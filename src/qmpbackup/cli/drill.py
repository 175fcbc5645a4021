# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup drill`: does a point boot?"""

import argparse
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_lock_wait, add_point, add_target, add_vm, seconds, size
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.errors import UsageError
from qmpbackup.plan.verdict import BootVerdict, Ready

if TYPE_CHECKING:
    from qmpbackup.service.drill_history import Drilled

CODES = {BootVerdict.PASS: 0, BootVerdict.FAIL: 1, BootVerdict.UNKNOWN: 3}


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "drill",
        help="boot a point in a sandbox, and judge whether it comes up",
        description="Boot the VM of a restore point in a sandbox, without a network, and judge whether it "
        "comes up: its guest agent answers, or a login prompt is on a serial port or a text screen. Exit code 0: it does; "
        "1: it does not; 3: that cannot be said; 7: the target cannot be read; 8: the point is damaged. The verdict is noted in a history.",
    )
    add = parser.add_argument
    add_target(parser, required=False)
    add_vm(parser)
    add_point(parser)
    add(
        "--within",
        type=seconds,
        default=600.0,
        metavar="S",
        help="seconds that it has to come up (default: 600)",
    )
    add(
        "--ready",
        type=Ready,
        choices=list(Ready),
        default=Ready.ANY,
        help="what proves that it has come up: its guest agent alone (agent); or a login prompt as well (login), "
        "or a picture full of colours that is at rest (screen), at once; or any of these, the agent first (any, default)",
    )
    add(
        "--exec",
        dest="commands",
        action="append",
        default=[],
        metavar="COMMAND",
        help="a shell command that must succeed in the guest, by its agent; repeat",
    )
    add(
        "--expect",
        dest="ports",
        type=port,
        action="append",
        default=[],
        metavar="tcp:PORT",
        help="a TCP port at which the guest must answer, in the closed network; repeat",
    )
    add(
        "--room",
        type=size,
        metavar="SIZE",
        help="bytes that it may write in /var/tmp, such as 500M (default: 8 GiB); more is exit code 3",
    )
    add("--accel", action="append", default=[], metavar="ACCEL", help="as in `boot`")
    add("--history", action="store_true", help="print what earlier drills found, and boot nothing")
    add("--json", action="store_true", help="print one JSON object a drill")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def port(text: str) -> int:
    """`tcp:PORT`."""
    kind, _, number = text.partition(":")
    if kind != "tcp" or not (number.isascii() and number.isdigit() and 0 < int(number) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form tcp:PORT")
    return int(number)


def run(arguments: argparse.Namespace) -> int:
    """Drill, or show what was found."""
    from qmpbackup.service.drill import ROOM, Request, drill
    from qmpbackup.service.drill_history import history

    if arguments.history:
        for each in history():
            _print(each, arguments.json)
        return 0
    if arguments.target is None:
        raise UsageError("This needs a target.", "Name it with --target.")
    drilled = drill(
        Request(
            target=arguments.target,
            point=arguments.point,
            vm=arguments.vm,
            seconds=arguments.within,
            commands=tuple(arguments.commands),
            ready=arguments.ready,
            ports=tuple(arguments.ports),
            accelerators=tuple(arguments.accel),
            lock_wait=arguments.lock_wait,
            room=ROOM if arguments.room is None else arguments.room,
        )
    )
    _print(drilled, arguments.json)
    return CODES[drilled.verdict]


def _print(drilled: "Drilled", as_json: bool) -> None:
    if as_json:
        from qmpbackup import documents

        say_json(documents.drilled(drilled))
        return
    parts = [drilled.verdict.upper(), drilled.point, drilled.time, f"{drilled.seconds} s"]
    say(printable("  ".join([*parts, drilled.system, drilled.reason])))
