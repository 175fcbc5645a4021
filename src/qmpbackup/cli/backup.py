# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup backup`: make a restore point."""

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qmpbackup.cli.arguments import (
    add_host,
    add_lock_wait,
    add_reserve,
    add_target,
    disks,
    image,
    names,
    path,
    require_socket,
    share,
    size,
)
from qmpbackup.cli.descriptors import descriptor
from qmpbackup.cli.printing import printable, say, say_json
from qmpbackup.errors import StorageError, UnrecordedChanges, UsageError
from qmpbackup.model import AUDIT, Level, Quiesce
from qmpbackup.plan.sizes import count_of, human

if TYPE_CHECKING:
    from qmpbackup.plan.progress import Progress
    from qmpbackup.service.backup import Outcome, Plan, Request
    from qmpbackup.service.offline import Offline

log = logging.getLogger(__name__)

DEGRADED = 3


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "backup",
        help="make a full or incremental backup of the running VM",
        description="Copy all disks of the running VM, as they are at one instant, into a target. With "
        "--offline, those of a VM that is off.",
    )
    _add_what(parser)
    _add_instant(parser)
    _add_offline(parser)
    _add_storing(parser)
    _add_checks(parser)
    _add_for_programs(parser)
    add_host(parser)
    add_lock_wait(parser, "VM or target")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and change nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    _add_options_of_the_original(parser)
    parser.set_defaults(run=run, without_effect=[])


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-l",
        "--level",
        default=Level.AUTO.value,
        choices=[level.value for level in Level],
        help="full: everything. inc: changes since the last point; fails (exit 4) where that is not "
        "possible. diff: changes since the last full. auto: inc where possible, else full, for each "
        "disk (the default). copy: a full outside every chain, which leaves no trace in the VM",
    )
    add_target(parser, "where the points live; a folder is made where it is missing")
    add(
        "-i",
        "--include",
        action="append",
        type=disks,
        metavar="DISK",
        help="take only these disks: disk id, node, drive or device; repeat, or separate by commas",
    )
    add(
        "-e",
        "--exclude",
        action="append",
        type=disks,
        metavar="DISK",
        help="leave these disks out; likewise",
    )


def _add_instant(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--quiesce",
        "--quisce",
        nargs="?",
        const="require",
        choices=["require", "try"],
        help="freeze the guest's file systems for the instant, with the guest agent. require (the "
        "default): no point without it. try: go on without, and mark the point so",
    )
    add(
        "--pause",
        action="store_true",
        help="stop the VM at the instant (for milliseconds; never during the copy)",
    )


def _add_offline(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--offline",
        action="store_true",
        help="back up the images of a VM that is off (without --socket); refused while one of them is "
        "open. Which VM and which images: as the newest point in the target says, or as follows",
    )
    add(
        "--image",
        action="append",
        type=image,
        metavar="ID=PATH[,format=F]",
        help="(--offline) a disk and its image; repeat. Without a format: that of the newest point",
    )
    add(
        "--vm",
        default="",
        metavar="NAME",
        help="(--offline) the VM, where the target does not tell, or a repository holds several",
    )


def _add_storing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--compress", action="store_true", help="compress what is stored, with zstd")
    add(
        "--speed-limit",
        type=size,
        default=0,
        metavar="N",
        help="bytes a second at most, for each disk; also 50M",
    )
    add(
        "--monthly",
        action="store_true",
        help="use a folder DIR/YYYY-MM for each month, so that each month starts a chain",
    )
    add("--uuid", default="", help="name under which a new target marks its bitmaps in the VM")
    add(
        "--scratch",
        type=path,
        metavar="DIR",
        help="where what the guest overwrites is kept meanwhile (default: beside each disk)",
    )
    add_reserve(parser)


def _add_checks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--audit",
        type=share,
        default=AUDIT,
        metavar="P%",
        help="(repositories) share of unchanged chunks that an incremental reads again and compares, "
        "against lost changes (default: 0.1%%; 0 for none); exit 9 where one differs",
    )
    add(
        "--verify-chain",
        action="store_true",
        help="(folders) first read all files that an incremental is to build on; if one is damaged, "
        "make a full with auto, and refuse with inc",
    )
    add(
        "--check-written",
        action="store_true",
        help="(repositories) open all data again before it is stored, against faulty memory",
    )


def _add_for_programs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--progress-fd",
        type=descriptor,
        metavar="N",
        help="(for programs) an open descriptor to which is written how far the backup is, as one JSON object a line",
    )
    add(
        "--limit-fd",
        type=descriptor,
        metavar="N",
        help="(for programs) an open descriptor from which limits are read while the backup runs: a line "
        "with the bytes a second for all disks together, or `none`",
    )


_ALWAYS = ("--include-raw", "--no-symlink")
"""Options of the original that say what we always do."""

_WITHOUT_EFFECT = (
    ("--progress-interval", 1),
    ("--remove-delay", 1),
    ("--blockdev-aio", 1),
    ("--blockdev-disable-cache", 0),
)
"""Those that tune what works differently here, and how many values each has."""

_REFUSED = {
    "--no-subdir": "each disk has a folder of its own in the target.",
    "--no-timestamp": "a backup file is never written over, so each has its time in its name.",
}
"""Those that ask for what would put backups at risk."""

_CBW_TIMEOUT = "45"
"""Seconds; the original's default is what `machine.view` uses."""


def _add_options_of_the_original(parser: argparse.ArgumentParser) -> None:
    for name in _ALWAYS:
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name, values in _WITHOUT_EFFECT:
        parser.add_argument(
            name, nargs=values, action=_WithoutEffect, dest="without_effect", help=argparse.SUPPRESS
        )
    for name in _REFUSED:
        parser.add_argument(name, nargs=0, action=_Refused, help=argparse.SUPPRESS)
    parser.add_argument("--cbw-timeout", type=_cbw_timeout, help=argparse.SUPPRESS)


class _WithoutEffect(argparse.Action):
    """Notes that an option was given which does nothing here."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        del parser, values
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), option_string])


class _Refused(argparse.Action):
    """Refuses an option whose meaning would be lost."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        del namespace, values
        parser.error(f"{option_string} is not supported: {_REFUSED[option_string or '']}")


def _cbw_timeout(text: str) -> str:
    if text != _CBW_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"it is {_CBW_TIMEOUT} seconds here where QEMU can count so far; leave it out."
        )
    return text


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    from qmpbackup.service.backup import back_up, dry_run

    request = _request(arguments)
    for option in arguments.without_effect:
        log.info("%s has no effect here.", option)
    if arguments.dry_run:
        plan = dry_run(request)
        if arguments.json:
            from qmpbackup import documents

            say_json(documents.plan(plan))
        else:
            say(*map(printable, _plan_lines(plan)))
        return 0
    from qmpbackup.cli.backup_log import BackupLog
    from qmpbackup.cli.descriptors import telling
    from qmpbackup.cli.live_table import LiveRow, LiveTable

    is_wanted = arguments.log_format == "text"
    with (
        BackupLog(request.target) as said,
        LiveTable(sys.stderr, ("DISK",), is_wanted=is_wanted) as table,
        telling(arguments.progress_fd) as tell,
    ):

        def watch(now: "Progress") -> None:
            table.show(
                [
                    LiveRow((each.disk,), now.stage.value, each.done, each.total)
                    for each in now.disks
                ]
            )
            tell(now)
            said.watch(now)

        outcome = back_up(request, watch)
        code = UnrecordedChanges.exit_code if outcome.alarm else DEGRADED if outcome.degraded else 0
        said.ended(outcome, code)
    try:
        _print(outcome, arguments.json)
    except (StorageError, BrokenPipeError) as error:
        log.warning("Point %s is complete, but: %s", outcome.point.id, error)
        return DEGRADED
    return code


def _request(arguments: argparse.Namespace) -> "Request":
    from qmpbackup.cli.descriptors import limits
    from qmpbackup.plan.selection import Selection
    from qmpbackup.service.backup import Request

    offline = _offline(arguments)
    return Request(
        address="" if offline else require_socket(arguments),
        offline=offline,
        target=arguments.target,
        level=Level(arguments.level),
        agent_address=arguments.agent_socket or "",
        selection=Selection(names(arguments.include), names(arguments.exclude)),
        quiesce=Quiesce(arguments.quiesce or "no"),
        pause=arguments.pause,
        compress=arguments.compress,
        speed=arguments.speed_limit,
        limit=limits(arguments.limit_fd),
        monthly=arguments.monthly,
        uuid=arguments.uuid,
        scratch=arguments.scratch,
        lock_wait=arguments.lock_wait,
        host=arguments.host,
        audit=arguments.audit,
        check=arguments.check_written,
        verify_chain=arguments.verify_chain,
        reserve=arguments.reserve,
    )


def _offline(arguments: argparse.Namespace) -> "Offline | None":
    from qmpbackup.service.offline import NamedImage, Offline

    if not arguments.offline:
        if arguments.image or arguments.vm:
            raise UsageError("--image and --vm are of a VM that is off.", "Add --offline.")
        return None
    if arguments.socket or arguments.quiesce:
        raise UsageError(
            "A VM that is off has no monitor and no guest agent.",
            "Leave --offline out for one that runs, else --socket and --quiesce.",
        )
    images = tuple(NamedImage(*each) for each in arguments.image or ())
    return Offline(images, arguments.vm)


def _print(outcome: "Outcome", as_json: bool) -> None:
    if as_json:
        from qmpbackup import documents

        say_json(documents.backed_up(outcome))
    else:
        say(*map(printable, _outcome_lines(outcome)))


def _outcome_lines(outcome: "Outcome") -> Iterable[str]:
    point = outcome.point
    for disk in point.disks:
        yield f"{disk.id:<20} {disk.level:<4}  {human(disk.file_size):>10}  {disk.file}"
    yield (
        f"Point {point.id}: {point.level}, {count_of(len(point.disks), 'disk')}, {human(point.size)}, "
        f"{point.consistency}-consistent, VM stopped for {point.pause * 1000:.1f} ms."
    )
    for complaint in outcome.degraded:
        yield f"Degraded: {complaint}"
    if outcome.alarm:
        yield f"Alarm: {outcome.alarm}"


def _plan_lines(plan: "Plan") -> Iterable[str]:
    yield f"Target {plan.target} (id {plan.target_id})"
    for disk in plan.disks:
        yield (
            f"{disk.disk.id:<20} {disk.level:<4}  at most {human(disk.bytes_to_copy):>10}  "
            f"({disk.reason})"
        )
    for skipped in plan.skipped:
        yield f"{skipped.name:<20} skipped  ({skipped.reason})"
    yield "Transaction at the instant:"
    for command in plan.transaction:
        yield f"  {command.name} {json.dumps(command.arguments)}"
