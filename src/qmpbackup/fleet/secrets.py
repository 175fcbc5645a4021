# SPDX-License-Identifier: Apache-2.0
"""Secrets, from where the configuration says that they are, as late as can be.

Children are told where a password is, or else by their environment, which only root and their own user
can see: never in arguments, logs, or what `config show` prints.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qmpbackup.errors import QmpBackupError, UsageError
from qmpbackup.fleet.plain_files import read_plain
from qmpbackup.fleet.settings import Secret, TargetSettings

FOLDER: Final = Path("/etc/qmpbackup/secrets")
"""Where credentials are that systemd does not hand over."""

_PASSWORDS: Final = ("RESTIC_PASSWORD", "RESTIC_PASSWORD_FILE", "RESTIC_PASSWORD_COMMAND")
_LARGEST: Final = 64 * 1024
_SECONDS: Final = 60.0
"""How long a command may take to print a secret."""
_SECRET_COUNTS: Final = 3600.0
_FAILURE_COUNTS: Final = 300.0


def file_of(secret: Secret, folder: Path = FOLDER) -> Path | None:
    """The file that holds a secret; None where a command prints it."""
    if secret.command:
        return None
    if secret.file:
        return Path(secret.file)
    handed_over = os.environ.get("CREDENTIALS_DIRECTORY")
    if handed_over and (Path(handed_over) / secret.credential).exists():
        return Path(handed_over) / secret.credential
    return folder / secret.credential


def reveal(secret: Secret, folder: Path = FOLDER) -> str:
    """What the secret is, without the end of its line.

    Raises:
        UsageError: it cannot be had.
    """
    path = file_of(secret, folder)
    data = _printed(secret.command) if path is None else _read(secret, path)
    text = data.decode("utf-8", "surrogateescape").rstrip("\r\n")
    if not text or "\0" in text or len(data) > _LARGEST:
        raise UsageError(
            f"{_named(secret)} is empty, too long, or no text.", "It holds the secret alone."
        )
    return text


def environment(target: TargetSettings, folder: Path = FOLDER) -> dict[str, str]:
    """The variables by which a child opens a target.

    A password that is in a file stays there: the variable says where. So children of the child find it
    as well, and it is in no environment.

    Raises:
        UsageError: a secret cannot be had.
    """
    told = {
        name: reveal(value, folder) if isinstance(value, Secret) else value
        for name, value in target.environment.items()
    }
    if target.password is None:
        return told
    password, path = reveal(target.password, folder), file_of(target.password, folder)
    none = dict.fromkeys(_PASSWORDS, "")
    if path is None:
        return {**told, **none, "RESTIC_PASSWORD": password}
    return {**told, **none, "RESTIC_PASSWORD_FILE": str(path)}


def _read(secret: Secret, path: Path) -> bytes:
    try:
        return read_plain(path, _LARGEST + 1)
    except OSError as error:
        hint = "Check that this user may read it."
        if secret.credential:
            hint = f"Write it to {FOLDER / secret.credential} (mode 0600), or have systemd load it (LoadCredential=)."  # fmt: skip
        raise UsageError(
            f"{_named(secret)} cannot be read from {path}: {error.strerror}.", hint
        ) from error


def _printed(command: tuple[str, ...]) -> bytes:
    """What a command prints. It is kept for a while, as is that it failed: a run asks again for each VM,
    and a program that is slow, or hangs, would hold up all others each time."""
    answer = _ANSWERS.get(command)
    if answer is None or time.monotonic() >= answer.until:
        answer = _ANSWERS[command] = _ask(command)
    if answer.failure:
        raise UsageError(*answer.failure)
    return answer.output


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a command has printed, or why it has failed and what to do; and until when that counts."""

    until: float
    output: bytes = field(default=b"", repr=False)
    failure: tuple[str, str] | None = None


_ANSWERS: Final[dict[tuple[str, ...], _Answer]] = {}


def _ask(command: tuple[str, ...]) -> _Answer:
    from qmpbackup import process

    failure = f"The command {command[0]} for a secret failed"
    try:
        done = process.run(command, timeout=_SECONDS)
    except QmpBackupError as error:
        said = f"{failure}: {error.message}", error.hint
        return _Answer(time.monotonic() + _FAILURE_COUNTS, failure=said)
    if done.code:
        said = f"{failure}.", "Run it by hand to see why."
        return _Answer(time.monotonic() + _FAILURE_COUNTS, failure=said)
    return _Answer(time.monotonic() + _SECRET_COUNTS, done.output)


def _named(secret: Secret) -> str:
    if secret.credential:
        return f"The credential {secret.credential}"
    return f"The secret in {secret.file}" if secret.file else f"What {secret.command[0]} prints"
