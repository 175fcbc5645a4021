# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup show`: one restore point in full."""

import argparse
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_lock_wait, add_point, add_target, add_vm
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.model import Point, StoredDisk


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "show",
        help="show one restore point in full",
        description="Show everything that is recorded about one restore point.",
    )
    add_target(parser)
    add_vm(parser)
    add_point(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest as one JSON object")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the point."""
    from qmpbackup.service import show

    point, missing = show.point(
        arguments.target, arguments.point, arguments.lock_wait, arguments.vm
    )
    if arguments.json:
        from qmpbackup import documents

        say_json(documents.shown(point))
        return 0
    say(*map(printable, _lines(point)), *(printable(f"lacking: {each}") for each in missing))
    return 0


def _lines(point: "Point") -> Iterable[str]:
    identity = point.vm.identity
    yield from _pairs(
        "",
        ("point", point.id),
        ("time", f"{point.time:%Y-%m-%d %H:%M:%S.%f} UTC"),
        ("level", point.level),
        ("parent", point.parent or "none"),
        ("consistency", point.consistency),
        ("VM stopped for", f"{point.pause * 1000:.1f} ms"),
        ("size", human(point.size)),
        ("VM", identity.name),
        ("UUID", identity.uuid),
        ("host", identity.host),
        ("socket", identity.address),
        ("machine", point.vm.machine),
        ("QEMU", point.vm.qemu_version),
        ("command line", shlex.join(point.vm.command_line)),
    )
    for disk in point.disks:
        yield f"disk {disk.shown}"
        yield from _disk(disk)
    for merged in point.merged:
        yield f"disk {merged.id}: merged into point {merged.into}"
    for skipped in point.skipped:
        yield f"not backed up: {skipped.name} ({skipped.reason})"
    for note in point.notes:
        yield f"note: {note}"


def _disk(disk: "StoredDisk") -> Iterable[str]:
    return _pairs(
        "  ",
        ("level", disk.level),
        ("reason", disk.reason),
        ("builds on", disk.parent or "nothing"),
        ("file", disk.file),
        ("snapshot", disk.snapshot),
        ("file size", f"{human(disk.file_size)} ({disk.file_size} bytes)"),
        ("disk size", f"{human(disk.size)} ({disk.size} bytes)"),
        ("digest", disk.digest),
        (
            "source",
            f"{disk.source_file} ({disk.source_format})".strip() if disk.source_file else "",
        ),
        ("bitmap", disk.bitmap),
    )


def _pairs(indent: str, *pairs: tuple[str, str]) -> Iterable[str]:
    for name, value in pairs:
        if value:
            yield f"{indent}{name + ':':<16} {value}"
