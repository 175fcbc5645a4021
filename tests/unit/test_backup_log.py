# SPDX-License-Identifier: Apache-2.0
"""What programs find in the log of a `backup`."""

import logging
from pathlib import Path

import pytest

from qmpbackup.cli.backup_log import BackupLog
from qmpbackup.cli.log_fields import fields_of, is_for_people
from qmpbackup.errors import StorageError
from qmpbackup.plan.progress import Progress, Stage
from qmpbackup.targets import opening


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/backup/web", "/backup/web"),
        ("restic:/srv/vms", "restic:/srv/vms"),
        ("restic:s3:https://s3.example.org/vms", "restic:s3:https://s3.example.org/vms"),
        ("restic:rest:https://hv1:marker@host/vms", "restic:rest:https://***@host/vms"),
    ],
)
def test_the_vm_and_the_target_are_named_and_no_password(
    target: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = opening.place(target) if ":" in target else Path(target)
    failing = StorageError("The disk is full.")
    with (
        caplog.at_level(logging.INFO, "qmpbackup"),
        pytest.raises(StorageError),
        BackupLog(place) as log,
    ):
        for stage in (Stage.PREPARE, Stage.COPY):
            log.watch(Progress("web", stage))
        raise failing
    begin, failure = caplog.records
    assert fields_of(begin) == {
        "event": "begin",
        "vm": "web",
        "target": shown,
        "work": "backup",
    }
    assert fields_of(failure) == {**fields_of(begin), "event": "failure", "exit_code": 7}
    assert "marker" not in caplog.text
    assert not any(map(is_for_people, caplog.records))
