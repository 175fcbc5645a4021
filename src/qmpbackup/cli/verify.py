# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup verify`: prove that the points of a target are whole."""

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import add_lock_wait, path
from qmpbackup.cli.printing import printable, say
from qmpbackup.cli.show import POINT_HELP
from qmpbackup.plan.sizes import human

if TYPE_CHECKING:
    from qmpbackup.service.verify import Report


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "verify",
        help="read everything in a target and prove it whole",
        description="Check manifests, files, lengths, digests, the links between images and QEMU's "
        "metadata of all restore points, or of one. Each file is read once. Exit code 8 if anything "
        "is damaged, or if there are backup files that belong to no point.",
    )
    parser.add_argument(
        "-t", "--target", required=True, type=path, metavar="DIR", help="where the points live"
    )
    parser.add_argument("-p", "--point", default="", metavar="POINT", help=f"only this; {_ONE}")
    parser.add_argument("--json", action="store_true", help="print one JSON object a point")
    add_lock_wait(parser)
    parser.set_defaults(run=run)


_ONE = POINT_HELP.replace(" (the default)", "")


def run(arguments: argparse.Namespace) -> int:
    """Verify and print what was found."""
    from qmpbackup.errors import DamagedError
    from qmpbackup.service.verify import Request, verify

    report = verify(Request(arguments.target, arguments.point, arguments.lock_wait))
    say(*(_json_lines(report) if arguments.json else _lines(report)))
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
    broken = sum(bool(verdict.problems) for verdict in report.verdicts)
    yield (
        f"{_count(len(report.verdicts), 'point')}, {_count(report.files, 'file')}, "
        f"{human(report.size)}: " + ("all whole." if report.whole else _summary(report, broken))
    )


def _summary(report: "Report", broken: int) -> str:
    parts = (
        (broken, "point", " damaged"),
        (len(report.damaged), "manifest", " damaged"),
        (len(report.extra), "file", " of no point"),
    )
    return ", ".join(_count(count, what) + end for count, what, end in parts if count) + "."


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _json_lines(report: "Report") -> Iterable[str]:
    for verdict in report.verdicts:
        yield json.dumps(
            {
                "schema": 1,
                "type": "verdict",
                "id": verdict.point.id,
                "ok": not verdict.problems,
                "problems": list(verdict.problems),
            }
        )
    yield json.dumps(
        {
            "schema": 1,
            "type": "summary",
            "ok": report.whole,
            "points": len(report.verdicts),
            "files": report.files,
            "size": report.size,
            "damaged": [{"path": each.path, "reason": each.reason} for each in report.damaged],
            "extra": list(report.extra),
            "foreign": list(report.foreign),
        }
    )
