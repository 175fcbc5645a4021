# SPDX-License-Identifier: Apache-2.0
"""What a monitor and a guest agent may say: understood, or refused as theirs; never a crash or a wait."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import mutations
from lab.disks import Disk, create
from lab.qemu import StartQemu
from lab.scripted import RenderedMonitor, ScriptedServer
from qmpbackup.errors import QuiesceError, VmError
from qmpbackup.machine import inventory
from qmpbackup.machine.agent import Agent
from qmpbackup.machine.monitor import Monitor
from qmpbackup.plan.commands import Command

EXAMPLES = int(os.environ.get("QMPBACKUP_FUZZ", "40"))
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, '
    b'"capabilities": ["oob"]}}\n'
)
LINES = [
    b'{"id": "__qmp#00002", "return": {"running": true}}\n',
    b'{"id": "__qmp#00002", "error": {"class": "GenericError", "desc": "no"}}\n',
    (
        b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "JOB_STATUS_CHANGE", '
        b'"data": {"id": "qmpbackup-1-copy0", "status": "running"}}\n'
    ),
]


@pytest.fixture
def replies(start_qemu: StartQemu, tmp_path: Path) -> dict[str, Any]:
    """What a real QEMU answers to each question."""
    disks = [
        Disk("vda", create(tmp_path / "a.qcow2", 1 << 20), filters=("throttle",)),
        Disk("sda", create(tmp_path / "b.raw", 1 << 20, "raw"), format="raw", bus="virtio-scsi"),
    ]
    vm = start_qemu(disks)
    vm.qmp.command("block-dirty-bitmap-add", {"node": disks[0].node, "name": "qmpbackup:a:b"})
    return {
        each.name: vm.qmp.command(each.name, dict(each.arguments)) for each in inventory.QUESTIONS
    }


def test_answers_to_all_questions(replies: dict[str, Any], tmp_path: Path) -> None:
    current = {name: mutations.rendered(reply) for name, reply in replies.items()}
    monitor = RenderedMonitor(lambda name: current[name])

    @fuzzed
    @given(data=st.data())
    def examine(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(replies)))
        current[name] = data.draw(mutations.texts([replies[name]])).replace(b"\n", b" ")
        try:
            with contextlib.suppress(VmError), Monitor.connect(str(tmp_path / "qmp")) as it:
                inventory.take(it)
        finally:
            current[name] = mutations.rendered(replies[name])

    with ScriptedServer(tmp_path / "qmp", monitor.serve):
        examine()


def test_lines_of_a_monitor(tmp_path: Path) -> None:
    said = b""

    def serve(client: socket.socket) -> None:
        client.sendall(GREETING)
        client.recv(65536)
        client.sendall(b'{"return": {}}\n')
        client.recv(65536)
        client.sendall(said)

    @fuzzed
    @given(st.lists(st.sampled_from(LINES) | mutations.blobs(LINES), max_size=4))
    def examine(lines: list[bytes]) -> None:
        nonlocal said
        said = b"".join(lines)
        with contextlib.suppress(VmError), Monitor.connect(str(tmp_path / "qmp")) as it:
            it.execute(Command("query-status"))

    with ScriptedServer(tmp_path / "qmp", serve):
        examine()


def test_lines_of_an_agent(tmp_path: Path) -> None:
    said = b""

    def serve(client: socket.socket) -> None:
        request = client.recv(65536)
        number = request.partition(b'"id": ')[2].partition(b"}")[0]
        client.sendall(b'\xff{"return": %b}\n' % number)
        request = client.recv(65536)
        number = request.partition(b'"id": ')[2].partition(b"}")[0]
        client.sendall(b'\xff{"return": %b}\n' % number + said)

    samples = [b'{"return": "thawed"}\n', b'{"error": {"class": "A", "desc": "b"}}\n', b"\xff\n"]

    @fuzzed
    @given(st.lists(st.sampled_from(samples) | mutations.blobs(samples), max_size=4))
    def examine(lines: list[bytes]) -> None:
        nonlocal said
        said = b"".join(lines)
        with contextlib.suppress(QuiesceError):
            agent = Agent.connect(str(tmp_path / "qga"))
            with contextlib.closing(agent):
                agent.frozen()

    with ScriptedServer(tmp_path / "qga", serve):
        examine()
