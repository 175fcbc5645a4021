# SPDX-License-Identifier: Apache-2.0
"""Monitors as set-ups have them: printed prettily, at a path longer than a socket's address, over TCP."""

import select
from pathlib import Path

import pytest

from lab import cli
from lab.backups import assert_restores, leftovers
from lab.disks import MIB, Disk, create, pattern
from lab.qemu import Qemu, StartQemu
from lab.scripted import FakeAgent, ScriptedServer
from stock.doomed import DoomedRun


@pytest.fixture
def vm(start_qemu: StartQemu, tmp_path: Path) -> Qemu:
    """A VM with a disk and a monitor with `pretty=on`."""
    disk = Disk("vda", create(tmp_path / "a", 10 * MIB, contents=pattern(10 * MIB, 1)))
    return start_qemu([disk], args=("-qmp-pretty", f"unix:{tmp_path}/pretty,server=on,wait=off"))


def test_a_monitor_that_prints_prettily(vm: Qemu, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for level in ("full", "inc"):
        vm.write("vda", 0, 512, 3)
        arguments = ("backup", "--level", level, "--target", target, "--json")
        result = cli.run("--socket", tmp_path / "pretty", *arguments).check()
    point = str(result.objects[-1]["point"]["id"])
    assert_restores(target, point, {"vda": vm.contents("vda")}, tmp_path)
    assert leftovers(vm) == []


def test_its_watchdog_understands_it(vm: Qemu, tmp_path: Path) -> None:
    with DoomedRun(tmp_path / "pretty") as doomed:
        doomed("qmp", "object-add", {"qom-type": "throttle-group", "id": "qmpbackup-stopped"})
        doomed("arm_stop", 60)
        doomed("qmp", "stop")
        doomed.kill()
        vm.qmp.poll(lambda: vm.qmp("query-status")["running"], 60)
        vm.qmp.poll(lambda: leftovers(vm) == [], 60)
        assert select.select([doomed.watchdog], [], [], 60)[0], "it waits for an answer"


def test_sockets_with_long_paths(vm: Qemu, tmp_path: Path) -> None:
    """Of the monitor and of the guest agent."""
    long = tmp_path / ("long" * 30)
    long.mkdir()
    vm.socket.rename(long / "monitor")
    agent, target = FakeAgent(), tmp_path / "target"
    with ScriptedServer(vm.folder / "agent", agent.serve):
        (vm.folder / "agent").rename(long / "agent")
        sockets = ("--socket", long / "monitor", "--agent-socket", long / "agent")
        arguments = ("backup", "--level", "full", "--target", target, "--quiesce")
        cli.run(*sockets, *arguments).check()
        assert "guest-fsfreeze-freeze" in agent.log
    missing = cli.run("--socket", long / "none", *arguments).check(13)
    assert "There is no socket" in missing.err
    (long / "file").write_text("")
    refused = cli.run("--socket", long / "file", *arguments).check(6)
    assert "is a file, not a socket" in refused.err
