# SPDX-License-Identifier: Apache-2.0
"""What is said of an error, whatever it is: in a run over many VMs no fault may end all, or be kept quiet."""

from qmpbackup.errors import Exhausted, Interrupted, QmpBackupError, StorageError


def said_of(error: BaseException) -> str:
    """A sentence."""
    if isinstance(error, QmpBackupError | Exhausted | Interrupted):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}."
    return f"Unexpected {type(error).__name__}: {error}."


def code_of(error: BaseException) -> int:
    """An exit code, which is never 0."""
    if isinstance(error, Interrupted):
        return error.exit_status
    if isinstance(error, QmpBackupError | Exhausted):
        return error.exit_code
    return StorageError.exit_code if isinstance(error, OSError) else QmpBackupError.exit_code
