# SPDX-License-Identifier: Apache-2.0
"""The password of a repository, from where restic takes it too; never from a command line."""

import codecs
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import QmpBackupError, UsageError

_QUOTES: Final = ("'", '"')
_SPACE: Final = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
"""What Go takes for space; Python knows four more."""


def read(environment: Mapping[str, str], *, confirm: bool = False, ask: bool = True) -> str:
    """`RESTIC_PASSWORD_FILE`, `RESTIC_PASSWORD_COMMAND`, `RESTIC_PASSWORD`, or, if somebody may be asked,
    from a terminal.

    What a file holds or a command prints may have space around it, which is no part of it. Bytes
    that are no UTF-8 are kept as surrogates.

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
        return _some(_from_command(command), "What RESTIC_PASSWORD_COMMAND prints")
    if file:
        return _some(_from_file(file), f"The password file {file}")
    if environment.get("RESTIC_PASSWORD"):
        return environment["RESTIC_PASSWORD"]
    return _some(_asked_for(confirm, ask=ask), "The password")


def _some(password: str, source: str) -> str:
    if not password:
        raise UsageError(f"{source} is empty.", "A repository always has a password: give it.")
    return password


def _from_file(file: str) -> str:
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(
            f"The password file {file} cannot be read: {why}.",
            "Check RESTIC_PASSWORD_FILE, and that this user may read it.",
        ) from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").strip(_SPACE)
    return _text(data.removeprefix(codecs.BOM_UTF8))


def _from_command(command: str) -> str:
    from qmpbackup.process import run

    arguments = split(command)
    try:
        done = run(arguments)
    except QmpBackupError as error:
        raise UsageError(f"RESTIC_PASSWORD_COMMAND failed: {error.message}", error.hint) from None
    if done.code:
        raise UsageError("RESTIC_PASSWORD_COMMAND failed.", "Run it by hand to see why.")
    return _text(done.output)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape").strip(_SPACE)


def split(command: str) -> list[str]:
    """The arguments of a command, as restic splits it, which is not as a shell does.

    Space, quotes and, outside of quotes, backslashes part arguments, of which none is empty. A quote
    after a backslash is a character like others, and so is the backslash inside quotes.

    Raises:
        UsageError: a quote is open at the end, or there is nothing.
    """
    found, current, quote, last = [], "", "", ""
    for character in command:
        if last != "\\" and character in {quote, *(() if quote else _QUOTES)}:
            # What came last stays what came before the quote.
            quote, parts = ("" if quote else character), True
        else:
            last = character
            parts = not quote and (character == "\\" or character in _SPACE)
        if parts:
            found.append(current)
        current = "" if parts else current + character
    if quote:
        raise UsageError("RESTIC_PASSWORD_COMMAND has a quote without its other.", "Close it.")
    arguments = [each for each in [*found, current] if each]
    if not arguments:
        raise UsageError("RESTIC_PASSWORD_COMMAND is empty.", "Unset it, or name a program.")
    return arguments


def _asked_for(confirm: bool, *, ask: bool) -> str:
    if not (ask and sys.stdin.isatty()):
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
