# SPDX-License-Identifier: Apache-2.0
"""Real replies of QEMU with one value spoilt: understood or refused, never a crash.

Every value in every reply that the inventory reads is replaced in turn by something of another kind.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.disks import Disk, create
from lab.qemu import StartQemu
from lab.scripted import FakeMonitor, ScriptedServer
from qmpbackup.errors import VmError
from qmpbackup.machine import inventory
from qmpbackup.machine.monitor import Monitor
from qmpbackup.plan.commands import Command

SPOILT: tuple[Any, ...] = (None, 7, -1, 1.5, True, "", "x\0y", "x\ny", [], [[]], {}, {"x": 1})
GRAPH = Command("x-debug-query-block-graph")


@pytest.fixture
def replies(start_qemu: StartQemu, tmp_path: Path) -> dict[str, Any]:
    disks = [
        Disk("vda", create(tmp_path / "a.qcow2", 1 << 20), filters=("throttle",)),
        Disk("sda", create(tmp_path / "b.raw", 1 << 20, "raw"), format="raw", bus="virtio-scsi"),
    ]
    vm = start_qemu(disks)
    vm.qmp.command("block-dirty-bitmap-add", {"node": disks[0].node, "name": "b"})
    vm.qmp("object-add", qom_type="throttle-group", id="qmpbackup-stopped")
    commands = (*inventory.QUESTIONS, GRAPH)
    return {each.name: vm.qmp.command(each.name, dict(each.arguments)) for each in commands}


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a value, itself first."""
    yield ()
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from ((key, *rest) for rest in places(item))


def spoil(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of a value that differs in one place."""
    if not place:
        return new
    changed = copy.deepcopy(value)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return changed


def test_every_value_of_every_reply_may_be_wrong(replies: dict[str, Any], tmp_path: Path) -> None:
    current = dict(replies)
    fake = FakeMonitor(lambda name: {"return": current[name]})
    refused = understood = 0
    with ScriptedServer(tmp_path / "qmp", fake.serve), Monitor.connect(str(tmp_path / "qmp")) as it:
        assert [disk.id for disk in inventory.take(it).vm.disks] == ["vda", "sda"]
        for name, reply in replies.items():
            for number, place in enumerate(places(reply)):
                new = SPOILT[number % len(SPOILT)]
                current[name] = spoil(reply, place, new)
                try:
                    inventory.take(it)
                    understood += 1
                except VmError:
                    refused += 1
                except Exception as error:
                    error.add_note(f"{name} {place} = {new!r}")
                    raise
            current[name] = reply
    assert refused > 50, "the inventory does not look at what it is given"
    assert understood > 50, "the inventory insists on what it does not need"
