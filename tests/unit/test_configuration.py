# SPDX-License-Identifier: Apache-2.0
"""The configuration of many VMs: what it comes to, and that all that is wrong is said at once."""

import os
import socket
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from qmpbackup.fleet.config import load, table
from qmpbackup.fleet.config.shapes import Wrongs, read_keys
from qmpbackup.fleet.settings import (
    Bandwidth,
    Configuration,
    Freezing,
    Keep,
    NotifySettings,
    NotifyType,
    Retry,
    RunSettings,
    Secret,
    TargetSettings,
    VmSettings,
    WhenOff,
)

NOTHING: Mapping[str, Collection[str]] = {}
SHORTEST = """
[group.all]
sockets = "/run/qemu/*.qmp"
[target.main]
location = "/backup/{vm}"
keep = { daily = 7, weekly = 4, monthly = 12 }
"""


def bind(folder: Path, *names: str) -> None:
    """Sockets in a folder, however long its path is."""
    folder.mkdir(parents=True, exist_ok=True)
    there = os.open(folder, os.O_RDONLY)
    for name in names:
        with socket.socket(socket.AF_UNIX) as each:
            each.bind(f"/proc/self/fd/{there}/{name}")
    os.close(there)


class Host:
    """A host's sockets and configuration; `/run/qemu` in a text is the folder of its sockets."""

    def __init__(self, folder: Path) -> None:
        self.run, self.file = folder / "run", folder / "etc" / "config.toml"
        (self.file.parent / "conf.d").mkdir(parents=True)

    def load(
        self, text: str, *more: str, found: Mapping[str, Collection[str]] = NOTHING
    ) -> Configuration:
        """What the texts say, as config.toml and files in conf.d."""
        for index, each in enumerate((text, *more)):
            name = f"conf.d/{index}.toml" if index else self.file.name
            written = each.replace("/run/qemu", str(self.run))
            (self.file.parent / name).write_text(written)
        return load(self.file, found)

    def socket(self, name: str) -> str:
        """Where a socket is."""
        return str(self.run / name)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with three VMs."""
    host = Host(tmp_path)
    bind(host.run, "web-1.qmp", "web-2.qmp", "db1.qmp", "web-1.qga")
    return host


def names(configuration: Configuration) -> list[str]:
    """The VMs."""
    return [each.name for each in configuration.vms]


def vm(configuration: Configuration, name: str) -> VmSettings:
    """One of them."""
    return next(each for each in configuration.vms if each.name == name)


def problems(configuration: Configuration) -> list[tuple[str, str]]:
    """Keys that something is wrong with, and the tables that it switches off."""
    return [(each.key, each.subject) for each in configuration.faults if not each.is_warning]


def test_five_lines_are_enough(host: Host) -> None:
    found = host.load(SHORTEST)
    assert found.is_usable
    assert not [each for each in found.faults if not each.is_warning]
    assert names(found) == ["db1", "web-1", "web-2"]
    assert vm(found, "db1") == VmSettings(
        "db1", host.socket("db1.qmp"), group="all", targets=("main",)
    )
    keep = Keep(daily=7, weekly=4, monthly=12)
    assert found.targets == (TargetSettings("main", "/backup/{vm}", keep=keep),)
    assert found.targets[0].place(vm(found, "db1"), "kvm1") == "/backup/db1"
    assert not found.uncovered


def test_the_defaults_of_the_table_are_those_of_the_settings() -> None:
    for keys, made in (
        (table.RUN, RunSettings()),
        (table.VM, VmSettings("", "")),
        (table.TARGET, TargetSettings("", "")),
        (table.NOTIFY, NotifySettings("", NotifyType.MAIL)),
    ):
        wrongs: Wrongs = []
        values = read_keys(keys, {}, "", wrongs)
        assert len(wrongs) == sum(each.is_required for each in keys)
        for name, value in values.items():
            assert getattr(made, name) == (frozenset(value) if name == "on" else value), name


def test_every_example_of_the_table_can_be_written() -> None:
    for keys in (table.RUN, table.VM, table.GROUP, table.OWN, table.TARGET, table.NOTIFY):
        for each in keys:
            wrongs: Wrongs = []
            if each.example is not None:
                each.kind.read(each.example, each.name, wrongs)
            assert not wrongs


def test_defaults_then_groups_then_vms(host: Host) -> None:
    found = host.load(
        """
        [defaults]
        quiesce = "require"
        schedule = ["01:00", "13:00"]
        retry = { times = 5 }
        agent = "/run/qemu/{vm}.qga"
        [target.main]
        location = "/backup/{vm}"
        """,
        """
        [group.web]
        sockets = "/run/qemu/web-*.qmp"
        schedule = "03:00"
        retry = { wait = "1m" }
        [group.db]
        sockets = "/run/qemu/db*.qmp"
        [vm.web-2]
        quiesce = "no"
        when_off = "offline"
        """,
    )
    assert names(found) == ["db1", "web-1", "web-2"]
    first, second, third = found.vms
    assert first.schedule == ("01:00", "13:00")
    assert first.agent == host.socket("db1.qga")
    assert second.schedule == third.schedule == ("03:00",)
    assert second.retry == third.retry == Retry(5, 60)
    assert (second.quiesce, third.quiesce) == (Freezing.REQUIRE, Freezing.NO)
    assert third.when_off is WhenOff.OFFLINE


def test_a_target_says_all_that_it_needs(host: Host) -> None:
    found = host.load(
        SHORTEST,
        """
        [target.offsite]
        location = "restic:s3:https://s3.example.org/vms"
        password = { credential = "offsite" }
        environment = { AWS_ACCESS_KEY_ID = "AK", AWS_SECRET_ACCESS_KEY = { command = ["pass", "s3"] } }
        keep = { last = "unlimited", within = "1y", tag = ["a,b"] }
        bandwidth = [{ during = "Mon..Fri 08:00-18:00", limit = "20M" }, { limit = "200M" }]
        sweep = { every = "" }
        min_free = "12.5%"
        """,
    )
    offsite = found.target("offsite")
    assert offsite.password == Secret(credential="offsite")
    assert offsite.environment["AWS_SECRET_ACCESS_KEY"] == Secret(command=("pass", "s3"))
    assert offsite.keep == Keep(last=-1, within="1y", tag=("a,b",))
    assert offsite.bandwidth == (
        Bandwidth(20 << 20, "Mon..Fri 08:00-18:00"),
        Bandwidth(200 << 20),
    )
    assert (offsite.sweep.every, offsite.min_free) == (0, 0.125)
    assert vm(found, "db1").targets == ("main", "offsite")


def test_all_that_is_wrong_is_said_at_once_with_file_and_key(host: Host) -> None:
    found = host.load(
        SHORTEST,
        """
        [vm.db1]
        scedule = "02:30"
        schedule = ["25:00", "02:30"]
        retry = { tims = 1, wait = 5 }
        targets = ["mian"]
        enabled = "yes"
        [group.web]
        quiesce = "maybe"
        [notify.ops]
        type = "mail"
        [gruop.x]
        a = 1
        """,
    )
    assert set(problems(found)) == {
        ("gruop.x", "gruop.x"),
        ("notify.ops.to", "notify.ops"),
        ("group.web.quiesce", "group.web"),
        ("group.web.sockets", "group.web"),
        ("vm.db1.scedule", "vm.db1"),
        ("vm.db1.enabled", "vm.db1"),
        ("vm.db1.targets[0]", "vm.db1"),
        ("vm.db1.schedule[0]", "vm.db1"),
        ("vm.db1.retry.tims", "vm.db1"),
        ("vm.db1.retry.wait", "vm.db1"),
    }
    said = "\n".join(map(str, found.faults))
    for guess in ("schedule", "times", "main", "group"):
        assert f'did you mean "{guess}"?' in said
    assert '"maybe" is none of auto, require, try, no' in said
    assert all(each.file.endswith("conf.d/1.toml") for each in found.faults)
    assert found.is_usable
    assert set(found.invalid) == {"gruop.x", "notify.ops", "group.web", "vm.db1"}
    assert names(found) == ["web-1", "web-2"]
