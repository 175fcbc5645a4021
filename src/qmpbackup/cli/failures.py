# SPDX-License-Identifier: Apache-2.0
"""What a command says of the error that ended it, and its exit code.

Errors of ours carry their sentence. What the surroundings may do at any place (no descriptor, no
memory, no thread, no room, a failing disk) is explained here, once, instead of at each place: by the
error, or by what caused it. Only what nothing explains is a bug.
"""

import errno
from collections.abc import Iterator
from typing import Final

from qmpbackup.durable import HINTS
from qmpbackup.errors import Exhausted, QmpBackupError, StorageError, lack_of

_OUR_OWN: Final = frozenset({errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTTY, errno.EDEADLK})
"""What a system call says to who calls it wrongly."""

BUG: Final = "Run with --debug and report the traceback."


def explained(error: BaseException) -> tuple[list[str], int]:
    """Sentences, and the exit code."""
    lacking = next(filter(None, map(lack_of, _causes(error))), None)
    if lacking is not None:
        own = error.message if isinstance(error, QmpBackupError | Exhausted) else ""
        sentences = [own] if own and own != lacking.message else []
        return [*sentences, lacking.message, lacking.hint], Exhausted.exit_code
    if isinstance(error, QmpBackupError):
        return [error.message, error.hint], error.exit_code
    if isinstance(error, OSError) and error.errno and error.errno not in _OUR_OWN:
        where = f" ({error.filename})" if error.filename else ""
        return [f"{error.strerror}{where}.", HINTS.get(error.errno, "")], StorageError.exit_code
    if isinstance(error, ImportError):
        return [f"A part of qmpbackup cannot be loaded: {error}.", "Install it again."], 1
    return [f"Unexpected {type(error).__name__}: {error}.", BUG], QmpBackupError.exit_code


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was made of, and what that was made of."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += (each.__context__, each.__cause__)
