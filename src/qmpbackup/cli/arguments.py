# SPDX-License-Identifier: Apache-2.0
"""Pieces that several command lines share."""

import argparse
from collections.abc import Sequence

from qmpbackup.errors import UsageError
from qmpbackup.plan.sizes import parse_size


def size(text: str) -> int:
    """An `argparse` type for sizes."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def names(values: Sequence[str] | None) -> tuple[str, ...]:
    """Names from an option that may be repeated and may hold several, separated by commas."""
    parts = (part.strip() for value in values or () for part in value.split(","))
    return tuple(part for part in parts if part)


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
