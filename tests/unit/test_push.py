# SPDX-License-Identifier: Apache-2.0
"""What is around the copying: the node that keeps the VM here while QEMU copies."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.scripted import FakeMonitor, ScriptedServer
from qmpbackup.machine import push
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.push import CopyOptions
from qmpbackup.machine.view import View
from qmpbackup.plan.names import RunNames
from qmpbackup.undo import UndoStack


@pytest.fixture
def address() -> Iterator[Path]:
    """Where a monitor may listen."""
    with tempfile.TemporaryDirectory(prefix="qmpb-") as folder:
        yield Path(folder) / "qmp"


def sent_around_copying(address: Path, refusal: str) -> list[str]:
    """The commands that change something, of a run that copies nothing and is then undone; with a
    `refusal`, QEMU does not add the node."""
    sent: list[str] = []

    def answer(name: str) -> dict[str, Any]:
        if name == "query-jobs":
            return {"return": []}
        sent.append(name)
        if refusal and name == "blockdev-add":
            return {"error": {"class": "GenericError", "desc": refusal}}
        return {"return": {}}

    names, undo = RunNames("0" * 6), UndoStack()
    with (
        ScriptedServer(address, FakeMonitor(answer).serve),
        Monitor.connect(str(address)) as monitor,
    ):
        view = View(monitor, [], names, teardown=undo, rollback=undo)
        push.copy_all(monitor, [], view, names, CopyOptions(), undo)
        assert undo.run() == []
    return sent


def test_the_vm_is_kept_here_while_it_is_copied(address: Path) -> None:
    assert sent_around_copying(address, "") == ["blockdev-add", "blockdev-del"]


def test_a_qemu_that_was_built_without_the_driver_copies_all_the_same(address: Path) -> None:
    """There is nothing to be removed then."""
    refusal = "Driver 'blkdebug' is not whitelisted"
    assert sent_around_copying(address, refusal) == ["blockdev-add"]
