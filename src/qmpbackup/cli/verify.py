# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup verify`: prove that the points of a target are whole."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import POINT_HELP, add_lock_wait, add_target, add_vm, share
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.plan.sizes import count_of, human

if TYPE_CHECKING:
    from qmpbackup.service.verify import Report


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "verify",
        help="prove the points of a target whole",
        description="Check all restore points, or one. In a folder every file is read once, and "
        "manifests, lengths, digests, the links between images and QEMU's metadata are checked. In a "
        "repository everything that describes the points is read, and all else must be there; its "
        "contents are read with --read-data. Exit code 8 if anything is damaged, or if a folder has "
        "backup files that belong to no point.",
    )
    add_target(parser)
    add_vm(parser)
    parser.add_argument("-p", "--point", default="", metavar="POINT", help=f"only this; {_ONE}")
    parser.add_argument(
        "--read-data",
        nargs="?",
        type=share,
        const=1.0,
        default=0.0,
        metavar="P%",
        help="in a repository, also read everything that the points need, or a random share of it, "
        "such as 5%%; a folder is always read whole",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a point")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


_PLACES = ("data/", "index/", "snapshots/")
"""Where damaged files of a repository lie."""

_ONE = POINT_HELP.replace(" (the default)", "")


def run(arguments: argparse.Namespace) -> int:
    """Verify and print what was found."""
    from qmpbackup.errors import DamagedError
    from qmpbackup.service.verify import Request, verify

    report = verify(
        Request(
            arguments.target,
            arguments.point,
            arguments.lock_wait,
            arguments.vm,
            arguments.read_data,
        )
    )
    if arguments.json:
        from qmpbackup import documents

        say_json(*documents.verified(report))
    else:
        say(*_lines(report))
    return 0 if report.whole else DamagedError.exit_code


def _lines(report: "Report") -> Iterable[str]:
    for verdict in report.verdicts:
        for problem in verdict.problems:
            yield printable(f"{verdict.point.id}: {problem}")
    for damage in report.damaged:
        yield printable(f"{damage.path}: {damage.reason}")
    for name in report.extra:
        yield printable(f"{name}: belongs to no restore point.")
    for name in report.foreign:
        yield printable(f"{name}: not ours; left alone.")
    yield f"{_looked_at(report)}: {_summary(report)}"


def _looked_at(report: "Report") -> str:
    points, size = count_of(len(report.verdicts), "point"), human(report.size)
    if report.read_files == report.files:
        return f"{points}, {count_of(report.files, 'file')}, {size}"
    read = f"{human(report.read_size)} of it read" if report.read_files else "none of it read"
    return f"{points}, {count_of(report.files, 'file')}, {size}, {read}"


def _summary(report: "Report") -> str:
    if report.whole:
        return "all whole." if report.read_files == report.files else "nothing missing."
    broken = sum(bool(verdict.problems) for verdict in report.verdicts)
    manifests = sum(not each.path.startswith(_PLACES) for each in report.damaged)
    parts = (
        (broken, "point", " damaged"),
        (manifests, "manifest", " damaged"),
        (len(report.damaged) - manifests, "file", " of the repository damaged"),
        (len(report.extra), "file", " of no point"),
    )
    return ", ".join(count_of(count, what) + end for count, what, end in parts if count) + "."
