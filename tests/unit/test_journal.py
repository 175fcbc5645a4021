# SPDX-License-Identifier: Apache-2.0
"""What is logged to systemd's journal: by its own protocol, to a socket like its own."""

import array
import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpbackup.cli.journal import MESSAGE_IDS, JournalHandler, is_journal
from qmpbackup.cli.log_fields import Happening, about


@dataclass
class Journal:
    """A socket where messages come in, and what was logged in its stead."""

    path: str
    socket: socket.socket
    instead: list[str]

    def fields(self) -> dict[str, str]:
        """Those of one message."""
        rights = socket.CMSG_SPACE(4)
        said, ancillary, _, _ = self.socket.recvmsg(1 << 20, rights)
        if ancillary:
            (fd,) = array.array("i", ancillary[0][2])
            with os.fdopen(fd, "rb") as file:
                file.seek(0)
                said = file.read()
        return dict(parsed(said))


def parsed(said: bytes) -> Iterator[tuple[str, str]]:
    """Names and values, as systemd's journald takes them apart."""
    while said:
        line, _, rest = said.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[9 + length :]
        yield name.decode(), value.decode()
        said = rest


class _Kept(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


@contextmanager
def listening(folder: Path) -> Iterator[tuple[Journal, logging.Logger]]:
    """A journal, and what logs to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        path = f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_CLOEXEC)}/journal"  # short
        ours.bind(path)
        instead: list[str] = []
        handler = JournalHandler(_Kept(instead), path)
        log = logging.Logger("test")
        log.addHandler(handler)
        try:
            yield Journal(path, ours, instead), log
        finally:
            handler.close()
            os.close(int(path.split("/")[4]))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[tuple[Journal, logging.Logger]]:
    with listening(tmp_path) as found:
        yield found


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.DEBUG, 7),
        (logging.INFO, 6),
        (logging.WARNING, 4),
        (logging.ERROR, 3),
        (logging.CRITICAL, 2),
    ],
)
def test_levels_are_priorities(
    journal: tuple[Journal, logging.Logger], level: int, priority: int
) -> None:
    found, log = journal
    log.log(level, "said")
    assert found.fields() == {
        "MESSAGE": "said",
        "PRIORITY": str(priority),
        "SYSLOG_IDENTIFIER": "qmpbackup",
    }


def test_what_a_message_is_about_is_in_fields(journal: tuple[Journal, logging.Logger]) -> None:
    found, log = journal
    extra = about(Happening.FAILURE, vm="web\nö", target="main", point="", exit_code=7)
    log.error("%s failed", "web", extra=extra)
    fields = found.fields()
    assert fields["MESSAGE"] == "web failed"
    assert fields["MESSAGE_ID"] == MESSAGE_IDS[Happening.FAILURE]
    assert fields["QMPBACKUP_VM"] == "web\nö"
    assert fields["QMPBACKUP_TARGET"] == "main"
    assert fields["QMPBACKUP_EXIT"] == "7"
    assert "QMPBACKUP_POINT" not in fields


def test_what_no_datagram_takes_goes_as_a_file(journal: tuple[Journal, logging.Logger]) -> None:
    found, log = journal
    large = "many words\n" * 100_000
    log.info(large)
    assert found.fields()["MESSAGE"] == large
    assert found.instead == []


def test_where_the_journal_takes_nothing_it_is_said_as_ever(
    journal: tuple[Journal, logging.Logger],
) -> None:
    found, log = journal
    found.socket.close()
    log.warning("nobody listens")
    assert found.instead == ["nobody listens"]


def test_names_that_are_no_text_are_sent_all_the_same(
    journal: tuple[Journal, logging.Logger],
) -> None:
    found, log = journal
    log.info("x", extra=about(Happening.BEGIN, vm="\udcff"))
    assert found.fields()["QMPBACKUP_VM"] == r"\udcff"


def test_only_what_leads_to_the_journal_is_taken_for_it(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as stream, (tmp_path / "other").open("w") as other:
        stat = os.fstat(stream.fileno())
        said = {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
        assert is_journal(stream, said)
        assert not is_journal(other, said)
        for wrong in ({}, {"JOURNAL_STREAM": ""}, {"JOURNAL_STREAM": "1"}, {"JOURNAL_STREAM": ":"}):
            assert not is_journal(stream, wrong)
