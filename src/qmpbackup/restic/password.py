# SPDX-License-Identifier: Apache-2.0
"""The password of a repository, from where restic takes it too; never from a command line."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import UsageError


def read(environment: Mapping[str, str], *, confirm: bool = False) -> str:
    """`RESTIC_PASSWORD_FILE`, `RESTIC_PASSWORD_COMMAND`, `RESTIC_PASSWORD`, or from a terminal.

    Raises:
        UsageError: there is none.
    """
    file = environment.get("RESTIC_PASSWORD_FILE")
    command = environment.get("RESTIC_PASSWORD_COMMAND")
    if file and command:
        raise UsageError(
            "Both RESTIC_PASSWORD_FILE and RESTIC_PASSWORD_COMMAND are set.", "Unset one."
        )
    if command:
        return _from_command(command)
    if file:
        try:
            return Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The password file {file} cannot be read: {error}.") from error
    if environment.get("RESTIC_PASSWORD"):
        return environment["RESTIC_PASSWORD"]
    return _asked_for(confirm)


def _from_command(command: str) -> str:
    from qmpbackup.process import run

    done = run(shlex.split(command))
    if done.code:
        raise UsageError("RESTIC_PASSWORD_COMMAND failed.", "Run it by hand to see why.")
    return done.output.decode().strip()


def _asked_for(confirm: bool) -> str:
    if not sys.stdin.isatty():
        raise UsageError(
            "There is no password for the repository.",
            "Set RESTIC_PASSWORD_FILE (or RESTIC_PASSWORD, or RESTIC_PASSWORD_COMMAND).",
        )
    import getpass

    with interrupt.let_through():
        password = getpass.getpass("Password of the repository: ")
        if confirm and getpass.getpass("Once more: ") != password:
            raise UsageError("The two passwords differ.", "Try again.")
    return password
