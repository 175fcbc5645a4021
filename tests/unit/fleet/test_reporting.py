# SPDX-License-Identifier: Apache-2.0
"""What a run owes at its end: metrics and one message, whatever of them fails."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lab.sinks import Mailbox, mail_server
from qmpbackup.fleet.history import History
from qmpbackup.fleet.messages import telling
from qmpbackup.fleet.reporting import began, ended, refused
from qmpbackup.fleet.settings import (
    Configuration,
    Fault,
    NotifySettings,
    NotifyType,
    TargetSettings,
    VmSettings,
)

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
USAGE = 2
SOME_FAILED = 14


@pytest.fixture
def box() -> Iterator[Mailbox]:
    with mail_server() as made:
        yield made


def configured(box: Mailbox, folder: Path, textfile: str) -> Configuration:
    """A VM that was never backed up, and was first seen long ago."""
    way = NotifySettings("ops", NotifyType.MAIL, to=("ops@example.org",), smtp=box.address)
    return Configuration(
        vms=(VmSettings("db1", "tcp:127.0.0.1:1", targets=("main",)),),
        targets=(TargetSettings("main", f"{folder}/{{vm}}"),),
        notify=(way,),
        textfile=textfile,
    )


def test_a_run_ends_with_metrics_and_one_message(tmp_path: Path, box: Mailbox) -> None:
    textfile = tmp_path / "qmpbackup.prom"
    configuration = configured(box, tmp_path, str(textfile))
    with History.opened(tmp_path / "state") as history:
        history.know("", ["db1"], NOW - timedelta(days=9))
        for number in range(3):
            now = NOW + timedelta(minutes=15 * number)
            began(configuration, history, now)
            assert ended(configuration, history, tmp_path, now, SOME_FAILED) == ()
    assert 'qmpbackup_vms{state="late"} 1.0' in textfile.read_text()
    assert [each["Subject"].partition(": ")[2] for each in box.mails] == ["1 late"]


def test_metrics_that_cannot_be_written_are_told(tmp_path: Path, box: Mailbox) -> None:
    configuration = configured(box, tmp_path, str(tmp_path / "nowhere" / "qmpbackup.prom"))
    with History.opened(tmp_path / "state") as history:
        (said,) = ended(configuration, history, tmp_path, NOW, 0)
    assert "nowhere" in said
    assert "metrics: Cannot write the metrics" in box.mails[0].get_content()


def test_a_configuration_that_stops_all_is_told_once_to_those_who_were_to_be_told(
    tmp_path: Path, box: Mailbox
) -> None:
    configuration = configured(box, tmp_path, "")
    broken = Configuration(faults=(Fault("config.toml", "", "is no TOML (line 3)"),))
    with History.opened(tmp_path / "state") as history:
        telling.remember(tmp_path, configuration)
        for _ in range(2):
            assert refused(broken, history, tmp_path, NOW, USAGE) == ()
            assert telling.has_reported(history)
        assert [each["Subject"].partition(": ")[2] for each in box.mails] == ["1 config"]
        assert "is no TOML (line 3)" in box.mails[0].get_content()
        ended(configuration, history, tmp_path, NOW, 0)
        assert "RECOVERED  configuration" in box.mails[1].get_content()
