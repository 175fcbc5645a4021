# SPDX-License-Identifier: Apache-2.0
"""Pieces that several command lines share."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qmpbackup.errors import UsageError
from qmpbackup.plan.sizes import parse_size

if TYPE_CHECKING:
    from qmpbackup.targets.interface import Address

_LARGEST_SIZE = 2**63 - 1
"""QEMU counts in signed 64-bit numbers."""

POINT_HELP = (
    "latest (the default), an id or its beginning, or a time: the newest point at or before it, "
    "such as 2026-11-02T03:04 (UTC unless it names a zone)"
)

_SHARED = ("--socket", "--agent-socket", "--debug", "--logfile", "-L", "--syslog", "--log-format")


class Parser(argparse.ArgumentParser):
    """The library's parser, whose errors say what to do, too."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2: how to call the command, what is wrong, what to do."""
        said, _, rest = message.partition("unrecognized arguments: ")
        hint = f"`{self.prog} --help` lists commands and options."
        if rest and not said and any(word.split("=")[0] in _SHARED for word in rest.split()):
            hint = "Options that all commands share, like --socket, stand before the command."
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog}: error: {hint}\n")


def size(text: str) -> int:
    """An `argparse` type for sizes."""
    try:
        value = parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if value > _LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is more than QEMU can count.")
    return value


def share(text: str) -> float:
    """An `argparse` type for shares, such as `5%` or `0.1%`; gives 0 to 1."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0% and 100%.")
    return value


def seconds(text: str) -> float:
    """An `argparse` type for times to wait; `inf` is for ever."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:  # also what is no number
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds.")
    return value


def path(text: str) -> Path:
    """An `argparse` type for paths. An empty one, such as an unset variable of a script leaves, is
    never taken for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty.")
    return Path(text)


def place(text: str) -> "Address":
    """An `argparse` type for targets."""
    from qmpbackup.targets import opening

    try:
        return opening.place(text) if text else path(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def target_id(text: str) -> str:
    """An `argparse` type for ids of targets. An empty one never stands for all of them."""
    if not text:
        raise argparse.ArgumentTypeError("the id is empty.")
    return text


def add_target(
    parser: argparse.ArgumentParser, what: str = "where the points live", *, required: bool = True
) -> None:
    """The option that names the target, as a folder or as a repository."""
    parser.add_argument(
        "-t",
        "--target",
        required=required,
        type=place,
        metavar="TARGET",
        help=f"{what}: a folder, or restic:LOCATION for a restic repository",
    )


def add_vm(parser: argparse.ArgumentParser) -> None:
    """The option that chooses one of the VMs whose points a repository holds."""
    parser.add_argument(
        "--vm",
        default="",
        metavar="VM",
        help="in a repository with points of several VMs: the one that is meant, by its name, its UUID, "
        "or as HOST/NAME",
    )


def add_point(parser: argparse.ArgumentParser) -> None:
    """The option that chooses a point."""
    parser.add_argument("-p", "--point", default="latest", metavar="POINT", help=POINT_HELP)


def add_disks(parser: argparse.ArgumentParser) -> None:
    """The option that chooses disks of a point."""
    parser.add_argument(
        "-d",
        "--disk",
        action="append",
        type=disks,
        metavar="ID",
        help="only these disks; repeat, or separate by commas",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option that names the configuration of many VMs."""
    import os

    parser.add_argument(
        "--config",
        type=path,
        default=path(os.environ.get("QMPBACKUP_CONFIG") or "/etc/qmpbackup/config.toml"),
        metavar="FILE",
        help="the configuration; *.toml in the folder conf.d beside it belong to it (default: "
        "QMPBACKUP_CONFIG, else /etc/qmpbackup/config.toml)",
    )


def add_host(parser: argparse.ArgumentParser) -> None:
    """The option that says what this host is called."""
    import os

    parser.add_argument(
        "--host",
        default=os.environ.get("RESTIC_HOST", ""),
        metavar="HOST",
        help="what the VM's host is called (default: RESTIC_HOST, else its own name). A VM without a "
        "UUID is known by it and by its name: for a host that has been renamed, give the old name",
    )


def disks(text: str) -> tuple[str, ...]:
    """An `argparse` type for names of disks, separated by commas; at least one."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r} names no disk.")
    return parts


def image(text: str) -> tuple[str, Path, str]:
    """An `argparse` type for a disk's image, `ID=PATH[,format=F]`; the format may be empty."""
    disk_id, _, rest = text.partition("=")
    image_path, _, image_format = (
        rest.rpartition(",format=") if ",format=" in rest else (rest, "", "")
    )
    if not disk_id or not image_path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=PATH[,format=F].")
    return disk_id, Path(image_path), image_format


def names(values: Sequence[tuple[str, ...]] | None) -> tuple[str, ...]:
    """All names from an option of the type `disks` that may be repeated."""
    return tuple(name for value in values or () for name in value)


def add_lock_wait(parser: argparse.ArgumentParser, of: str = "target") -> None:
    """The option for waiting for other runs."""
    parser.add_argument(
        "--lock-wait",
        type=seconds,
        default=0.0,
        metavar="S",
        help=f"seconds to wait for another run of the same {of} (default: 0, which ends in exit 11)",
    )


def add_reserve(parser: argparse.ArgumentParser) -> None:
    """The option for room that stays free."""
    parser.add_argument(
        "--reserve",
        type=size,
        metavar="SIZE",
        help="bytes that stay free on each file system that is written to, for the images of running "
        "VMs there; also 500M (default: 1 GiB, but at most 5%% of it and half of what is free; 0: do "
        "not look at the room at all); exit 7 where that cannot be",
    )


def require_socket(arguments: argparse.Namespace) -> str:
    """The VM's address, which commands that talk to a VM need.

    Raises:
        UsageError: it was not given.
    """
    if not arguments.socket:
        raise UsageError(
            "This command needs the VM's monitor.", "Name it before the command: --socket PATH."
        )
    return str(arguments.socket)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Options of all three commands."""
    parser.add_argument("--debug", action="store_true", help="log every step, and tracebacks")
    parser.add_argument("-L", "--logfile", metavar="F", help="also log to this file")
    parser.add_argument("--syslog", action="store_true", help="also log to syslog")
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="what is logged to standard error: sentences, or one JSON object a line",
    )
