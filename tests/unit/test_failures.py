# SPDX-License-Identifier: Apache-2.0
"""What is said of an error that ended a command: its cause and its exit code, not its place."""

import errno
import logging
import os
import resource
import sys

import pytest

from qmpbackup.cli.failures import explained
from qmpbackup.cli.main import _Plain
from qmpbackup.durable import storage_errors
from qmpbackup.errors import DamagedError, Exhausted, StorageError, VmError


def os_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (os_error(errno.EMFILE), 1, "LimitNOFILE="),
        (os_error(errno.ENFILE), 1, "too many files open"),
        (os_error(errno.ENOMEM), 1, "not enough memory"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("can't start new thread"), 1, "not enough memory"),
        (ImportError("x.so: failed to map segment from shared object"), 1, "not enough memory"),
        (ImportError("x.so: cannot open shared object file: Too many open files"), 1, "ulimit -n"),
        (ModuleNotFoundError("No module named 'blake3'"), 1, "cannot be loaded"),
        (os_error(errno.ENOSPC, "/run/x"), 7, "No space left on device (/run/x)"),
        (os_error(errno.EROFS, "/run/x"), 7, "read-only"),
        (os_error(errno.EIO), 7, "storage itself"),
        (VmError("It is gone.", "Start it."), 6, "Start it."),
    ],
)
def test_surroundings_have_their_sentence(error: BaseException, code: int, said: str) -> None:
    sentences, found = explained(error)
    assert found == code
    assert said in " ".join(sentences)
    assert "Unexpected" not in " ".join(sentences)


@pytest.mark.parametrize("error", [KeyError("x"), os_error(errno.EBADF), RuntimeError("a bug")])
def test_only_what_nothing_explains_is_a_bug(error: BaseException) -> None:
    sentences, code = explained(error)
    assert code == 1
    assert sentences[0].startswith("Unexpected")


def test_a_lack_is_told_whatever_was_made_of_it() -> None:
    try:
        try:
            raise os_error(errno.EMFILE)
        except OSError as error:
            raise VmError("Cannot connect: Too many open files.", "Check the address.") from error
    except VmError as error:
        sentences, code = explained(error)
    assert code == 1
    assert sentences[0] == "Cannot connect: Too many open files."
    assert "address" not in " ".join(sentences)


def test_a_lack_of_ours_is_no_failure_of_the_storage() -> None:
    with pytest.raises(Exhausted), storage_errors("read it"):
        raise os_error(errno.EMFILE)
    with pytest.raises(StorageError), storage_errors("read it"):
        raise os_error(errno.EIO)


def test_a_traceback_is_printed_so_that_no_terminal_obeys_it() -> None:
    try:
        raise DamagedError("a\x1b[2Jb\x9bc\u202ed")
    except DamagedError:
        record = logging.LogRecord(
            "qmpbackup", logging.DEBUG, __file__, 1, "Where", None, sys.exc_info()
        )
    text = _Plain().format(record)
    assert "Traceback" in text
    assert all(line.isprintable() for line in text.splitlines())
    assert "\\x1b[2J" in text


def test_files_that_end_at_a_limit_of_this_process_are_no_fault_of_the_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = os_error(errno.EFBIG)
    assert explained(error)[1] == StorageError.exit_code
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, resource.RLIM_INFINITY))
    sentences, code = explained(error)
    assert code == Exhausted.exit_code
    assert "ulimit -f" in sentences[1]
    with pytest.raises(Exhausted), storage_errors("write it"):
        raise error
