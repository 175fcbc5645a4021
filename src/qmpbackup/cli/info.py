# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup info`, `cleanup` and `recover`: what the VM has, and what of ours to remove from it."""

import argparse

from qmpbackup.cli.arguments import add_host, add_lock_wait, add_target, require_socket, target_id
from qmpbackup.cli.printing import printable, say, say_json


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the three commands."""
    info = commands.add_parser(
        "info",
        help="show the VM's disks or their bitmaps",
        description="Show the disks of the running VM, or the dirty bitmaps on them, as JSON.",
    )
    info.add_argument("--show", required=True, choices=["blockdev", "bitmaps"], help="what to show")
    add_lock_wait(info, "VM")
    info.set_defaults(run=show)
    cleanup = commands.add_parser(
        "cleanup",
        help="remove our bitmaps from the VM",
        description="Remove change bitmaps of qmpbackup from the running VM. Bitmaps of other tools "
        "stay. The next backup into a target whose bitmaps are gone is a full.",
    )
    cleanup.add_argument(
        "--remove-bitmap",
        "--remove-bitmaps",
        required=True,
        action="store_true",
        help="say that this is what you want",
    )
    cleanup.add_argument("--uuid", type=target_id, help="only those of the target with this id")
    add_lock_wait(cleanup, "VM")
    cleanup.set_defaults(run=clean_up)
    recover = commands.add_parser(
        "recover",
        help="remove what a run that died left in the VM",
        description="Let a VM run again that a dead run had stopped, thaw its guest, and remove the "
        "dead run's jobs, nodes and descriptors. Each backup does this first by itself.",
    )
    add_target(recover, "clean up for this target, too", required=False)
    recover.add_argument("--dry-run", action="store_true", help="only say what would be done")
    add_host(recover)
    add_lock_wait(recover, "VM")
    recover.set_defaults(run=recover_vm)


def show(arguments: argparse.Namespace) -> int:
    """Print disks or bitmaps."""
    from qmpbackup import documents
    from qmpbackup.service import session

    address, wait = require_socket(arguments), arguments.lock_wait
    with session.opened(address, lock_wait=wait, look_only=True) as opened:
        vm = opened.vm
    if arguments.show == "blockdev":
        say_json(*documents.disks(vm.disks, vm.skipped), indent=4)
    else:
        say_json(*documents.bitmaps(vm.disks), indent=4)
    return 0


def clean_up(arguments: argparse.Namespace) -> int:
    """Remove bitmaps and say which."""
    from qmpbackup.service.bitmaps import remove_bitmaps

    removed = remove_bitmaps(require_socket(arguments), arguments.uuid, arguments.lock_wait)
    removed = [printable(f"Removing bitmap: {name}") for name in removed]
    say(*removed or ["There was no bitmap of ours to remove."])
    return 0


def recover_vm(arguments: argparse.Namespace) -> int:
    """Clean up and say what was done."""
    from qmpbackup.service.recover import recover

    done = recover(
        require_socket(arguments),
        agent_address=arguments.agent_socket or "",
        target=arguments.target,
        dry_run=arguments.dry_run,
        lock_wait=arguments.lock_wait,
        host=arguments.host,
    )
    say(*map(printable, done or ["Nothing is left of an earlier run."]))
    return 0
