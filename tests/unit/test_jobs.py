# SPDX-License-Identifier: Apache-2.0
"""How jobs ended, from what QEMU says of them."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.scripted import FakeMonitor, ScriptedServer
from qmpbackup.machine import jobs
from qmpbackup.machine.jobs import JobEnd
from qmpbackup.machine.monitor import Monitor

JOB = "qmpbackup-1-job0"
Wait = Callable[[Monitor, Sequence[str]], list[JobEnd]]


@pytest.fixture
def address() -> Iterator[Path]:
    """Where a monitor may listen."""
    with tempfile.TemporaryDirectory(prefix="qmpb-") as folder:
        yield Path(folder) / "qmp"


@pytest.mark.parametrize("wait", [jobs.wait, jobs.wait_until_still])
def test_the_side_that_failed_is_known_of_a_job_that_was_over_at_once(
    address: Path, wait: Wait
) -> None:
    """QEMU said it before we asked for the first time."""

    def answer(name: str) -> dict[str, Any]:
        if name != "query-jobs":
            return {"return": {}}
        data = {"device": JOB, "operation": "write", "action": "report"}
        event = {"event": "BLOCK_JOB_ERROR", "data": data, "timestamp": {"seconds": 0}}
        assert fake.client
        fake.client.sendall(json.dumps(event).encode() + b"\n")
        job = {"id": JOB, "type": "backup", "status": "concluded", "error": "No space"}
        return {"return": [{**job, "current-progress": 0, "total-progress": 1}]}

    fake = FakeMonitor(answer)
    with ScriptedServer(address, fake.serve), Monitor.connect(str(address)) as monitor:
        assert wait(monitor, [JOB]) == [JobEnd(JOB, "No space", "write")]
