# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup boot`: a VM from a point, at once."""

import argparse
import shlex
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_lock_wait, add_point, add_reserve, add_target, add_vm, path
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.cli.settle import add_to, settle_there
from qmpbackup.errors import QmpBackupError, UsageError

if TYPE_CHECKING:
    from qmpbackup.service.boot import Prepared, Request
    from qmpbackup.targets.interface import Address


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "boot",
        help="run a VM from a point at once, without copying it first",
        description="Start the VM of a restore point from its recorded command line: every device is kept, "
        "the disks are overlays over the point, which is served in the background and only read, and "
        "there is no network unless it is asked for. The command returns when the VM runs. Refused while "
        "the original runs. Given again, or with --to alone, it goes on with what was booted there.",
    )
    add = parser.add_argument
    add_target(parser, required=False)
    add_vm(parser)
    add_point(parser)
    add_to(
        parser,
        "folder for what the VM writes, on local storage (default: one in /var/lib/qmpbackup/boots, "
        "or ~/.local/state/qmpbackup/boots; with --end, that of the only booted VM)",
    )
    add("--network", action="store_true", help="with the recorded networks (default: closed ones)")
    add(
        "--accel",
        action="append",
        default=[],
        metavar="ACCEL",
        help="accelerator for QEMU, such as kvm or tcg; repeat (default: the recorded ones, then tcg)",
    )
    add(
        "--original-off",
        action="store_true",
        help="the VM of the point does not run, though that cannot be seen from here",
    )
    add("--settle", action="store_true", help="then move it to local storage, as `settle` does")
    add_reserve(parser)
    add("--json", action="store_true", help="print the result as JSON")
    instead = parser.add_mutually_exclusive_group()
    flag = instead.add_argument
    flag(
        "--print",
        dest="only_print",
        action="store_true",
        help="print the commands that do it, what was left out and what is missing, and start nothing",
    )
    flag("--list", dest="list_all", action="store_true", help="list the VMs that this user booted")
    flag("--end", action="store_true", help="end a booted VM, and throw away what it has written")
    flag(
        "--keep",
        type=path,
        metavar="DIR",
        help="serve, start and watch the VM booted in DIR, until it ends; `boot` does so in the background",
    )
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Boot, list, end or keep."""
    if arguments.list_all:
        return _list(arguments.json)
    if arguments.end:
        return _end(arguments)
    if arguments.keep is not None:
        return _keep(arguments)
    if arguments.target is None and (arguments.only_print or arguments.to is None):
        raise UsageError(
            "This needs a target.", "Name it with --target, or a folder of before with --to."
        )
    if arguments.only_print:
        return _print(arguments)
    return _boot(arguments)


def _request(arguments: argparse.Namespace) -> "Request":
    from qmpbackup.service.boot import Request

    return Request(
        target=arguments.target,
        point=arguments.point,
        vm=arguments.vm,
        folder=arguments.to,
        network=arguments.network,
        accelerators=tuple(arguments.accel),
        lock_wait=arguments.lock_wait,
        original_off=arguments.original_off,
    )


def _boot(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.boot import again, asked, boot
    from qmpbackup.service.booted import chosen

    target: Address | None = None
    if arguments.target is None:
        found = again(chosen(arguments.to), original_off=arguments.original_off)
    else:
        request = asked(_request(arguments))
        target, found = request.target, boot(request)
    if arguments.json:
        from qmpbackup import documents

        say_json(documents.booted(found))
    else:
        _as_text(found)
    if arguments.settle:
        return settle_there(found.folder.path, arguments, target)
    return 0


def _as_text(found: "Prepared") -> None:
    folder = found.folder
    say(
        f"The VM of point {found.boot.point} runs.",
        printable(f"  what it writes is in   {folder.path}"),
        printable(f"  its monitor is         {folder.monitor('qmp')}"),
    )
    if found.launch.agent:
        say(printable(f"  its guest agent is at  {found.launch.agent}"))
    for console in found.launch.consoles:
        say(printable(f"  its serial port says   {console}"))
    for each in found.launch.left_out:
        say(printable(f"Left out: {each}"))
    if not found.boot.network:
        say("It has no network (--network).")
    say(
        printable(f"To keep it: qmpbackup settle --to {shlex.quote(str(folder.path))}"),
        printable(f"To throw it away: qmpbackup boot --end --to {shlex.quote(str(folder.path))}"),
    )


def _print(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.boot import prepared

    found = prepared(_request(arguments))
    if arguments.json:
        from qmpbackup import documents

        say_json(documents.bootable(found))
        return 0
    say(*(f"# Left out or changed: {printable(each)}" for each in found.launch.left_out))
    say(*(f"# Needs {printable(each)}" for each in found.launch.needs))
    say(*(f"# In the way: {printable(each)}" for each in found.obstacles))
    if found.boot.shown_target != found.boot.target:
        say("# *** stands for a secret in the location of the repository.")
    say(*(printable(shlex.join(each)) for each in found.by_hand()))
    return 0


def _list(as_json: bool) -> int:
    from qmpbackup import documents
    from qmpbackup.service.booted import look

    damage: QmpBackupError | None = None
    for each in look():
        if isinstance(each, QmpBackupError):
            damage = damage or each
        elif as_json:
            say_json(documents.seen(each))
        else:
            watched = "watched" if each.kept else "not watched"
            line = (each.folder.path, each.boot.point, each.boot.phase, each.status, watched)
            say(printable("  ".join(map(str, line))))
    if damage is not None:
        raise damage
    return 0


def _end(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.booted import chosen, end

    folder = chosen(arguments.to)
    end(folder)
    say(printable(f"Ended; what the VM had written to {folder.path} is gone."))
    return 0


def _keep(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.boot_folder import BootFolder
    from qmpbackup.service.boot_keeper import keep

    folder = BootFolder(arguments.keep.absolute())
    keep(folder, lambda: say("The VM runs."))
    return 0
