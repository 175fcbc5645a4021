# SPDX-License-Identifier: Apache-2.0
"""The configuration of many VMs: what it comes to, and that all that is wrong is said at once."""

import json
import os
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.sockets import bind
from qmpbackup.errors import UsageError
from qmpbackup.fleet import secrets
from qmpbackup.fleet.config import files, load, table
from qmpbackup.fleet.config.checking import warnings
from qmpbackup.fleet.config.files import NAMED, SINGLE
from qmpbackup.fleet.config.loading import load_all
from qmpbackup.fleet.config.pages import example, reference, schema
from qmpbackup.fleet.config.shapes import Wrongs, read_keys
from qmpbackup.fleet.config.showing import everything, of_vm
from qmpbackup.fleet.settings import (
    Bandwidth,
    Configuration,
    Event,
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


@pytest.mark.parametrize(
    ("text", "key", "sentence"),
    [
        ("[run]\nparalel = 2", "run.paralel", 'did you mean "parallel"'),
        ("[run]\nparallel = true", "run.parallel", "a number from 1 to 32, not true or false"),
        ("[run]\nparallel = 99", "run.parallel", "from 1 to 32"),
        ("[run]\nwindow = '8-12'", "run.window", "no window of hours"),
        ("[defaults]\nlevel = 'diff'", "defaults.level", "none of auto, inc, full"),
        ("[defaults]\nschedule = 02:30:00", "defaults.schedule", "not a date or time"),
        ("[defaults]\ntargets = ['mian']", "defaults.targets[0]", 'did you mean "main"'),
        ("[defaults]\nagent = '/run/{vn}.qga'", "defaults.agent", "{vn} stands for nothing"),
        ("[defaults]\nsocket = '/run/a'", "defaults.socket", "Unknown key"),
        ("[metrics]\ntextfile = 'x.prom'", "metrics.textfile", "begin with a slash"),
        ("[defualts]\nenabled = false", "defualts", 'did you mean "defaults"'),
        ("parallel = 2", "parallel", "Unknown table"),
        ("run = 1", "run", "must be a table"),
        ("[run\n", "", "This is no TOML"),
        (f"a = {'[' * 5000}", "", "nested too deeply"),
        (f"a = {'9' * 5000}", "", "number in it is too long"),
    ],
)
def test_what_counts_for_all_stops_all(host: Host, text: str, key: str, sentence: str) -> None:
    found = host.load(SHORTEST, text)
    assert not found.is_usable
    told = next(each for each in found.faults if not each.subject)
    assert (told.key, Path(told.file).name) == (key, "1.toml")
    assert sentence in told.sentence


@pytest.mark.parametrize(
    ("text", "subject", "sentence"),
    [
        ("[target.x]\nlocation = 'backup'", "target.x", "begin with a slash"),
        ("[target.x]\nlocation = 's3:http://h/b'", "target.x", "restic:s3:"),
        ("[target.x]\nlocation = '/b/{name}'", "target.x", "{name} stands for nothing"),
        ("[target.x]\nlocation = '/b'", "target.x", "write {vm} into it"),
        ("[target.x]\nlocation = '/backup/{vm}'", "target.x", "is that of target.main, too"),
        ("[target.x]\nlocation = '/backup/./{vm}/'", "target.x", "is that of target.main, too"),
        ("[target.x]\nkeep = {}", "target.x", "This is missing"),
        ("[target.x]\nlocation = 'restic:/r'\nkeep = { daily = -2 }", "target.x", "unlimited"),
        ("[target.x]\nlocation = 'restic:/r'\nmin_free = 5", "target.x", "no share"),
        ("[target.x]\nlocation = 'restic:/r'\nbandwidth = [{}]", "target.x", "This is missing"),
        ("[vm.x]\nenabled = true", "vm.x", "no VM x now"),
        ("[vm.x]\nsocket = 'x.qmp'", "vm.x", "begins with a slash"),
        ("[vm.db1]\ninclude = 'vda'", "vm.db1", "Here belongs a list"),
        ("[vm.db1]\nlimits = { speed = '5 apples' }", "vm.db1", "Not a size"),
        ("[vm.db1]\nquiesce = 'require'", "vm.db1", "no agent is named"),
        ("[vm.db1]\noff_age = '3 fortnights'", "vm.db1", "no length of time"),
        ("[vm.db1]\noff_age = '999999999w'", "vm.db1", "a hundred years"),
        ("[vm]\nsocket = '/run/a'", "vm.socket", "with a name, such as [vm.NAME]"),
        ("[vm.'../x']\nsocket = '/run/a'", "vm.../x", "Nothing can be called so"),
        ("[group.x]\nsockets = '/run/*/*.qmp'", "group.x", "with one *"),
        ("[vms.a]\nsocket = '/run/a'", "vms.a", 'did you mean "vm"'),
        ("[notify.x]\ntype = 'email'", "notify.x", 'did you mean "mail"'),
        ("[notify.x]\ntype = 'webhook'\nurl = 'ftp://x'", "notify.x", "no address of a web"),
        ("[notify.x]\ntype = 'mail'\nto = 'a@b'\non = ['lat']", "notify.x", 'mean "late"'),
        ("[target.main]\nlocation = '/b/{vm}'", "target.main", "stands in "),
    ],
)
def test_what_counts_for_one_switches_off_that_one(
    host: Host, text: str, subject: str, sentence: str
) -> None:
    found = host.load(SHORTEST, text)
    if "no VM x now" in sentence:  # with one group, it is taken for one of it that is off
        assert any(each.subject == subject and each.is_warning for each in found.faults)
        assert "x" in names(found)
        return
    assert found.is_usable
    assert subject in found.invalid
    assert any(sentence in each.sentence for each in found.faults), found.faults
    if subject != "target.main":
        assert "web-1" in names(found)
        assert vm(found, "web-1").targets == ("main",)


def test_nobody_waits_for_what_is_no_plain_file(host: Host, tmp_path: Path) -> None:
    host.load(SHORTEST, "[run]\nparallel = 2")  # which makes the folder conf.d
    os.mkfifo(host.file.parent / "conf.d" / "pipe.toml")
    found = load_all(host.file)
    assert ["it is no plain file" in each.sentence for each in found.configuration.faults] == [True]
    secret = tmp_path / "secret"
    os.mkfifo(secret)
    with pytest.raises(UsageError, match="it is no plain file"):
        secrets.reveal(Secret(file=str(secret)))


def test_no_secret_stands_in_a_file_or_is_said(host: Host) -> None:
    mark = "hunter2marker"
    found = host.load(
        SHORTEST,
        f"""
        [target.a]
        location = "rest:https://u:{mark}@h/x"
        password = "{mark}"
        [target.b]
        location = "restic:/r"
        password = {{ credential = ["{mark}"], x = "{mark}" }}
        [target.b.environment]
        AWS_SECRET_ACCESS_KEY = "{mark}"
        RESTIC_REST_PASSWORD = "{mark}"
        RESTIC_PASSWORD = "{mark}"
        AZURE_ACCOUNT_KEY = "{mark}"
        AWS_SESSION_TOKEN = "{mark}"
        AWS_ACCESS_KEY_ID = "known"
        [notify.x]
        type = "webhook"
        url = "https://u:{mark}@h/"
        password = "{mark}"
        token = 5
        """,
    )
    keys = {each.key for each in found.faults if not each.is_warning}
    assert keys == {
        "target.a.location",
        "target.a.password",
        "target.b.password",
        "target.b.environment.AWS_SECRET_ACCESS_KEY",
        "target.b.environment.RESTIC_REST_PASSWORD",
        "target.b.environment.RESTIC_PASSWORD",
        "target.b.environment.AZURE_ACCOUNT_KEY",
        "target.b.environment.AWS_SESSION_TOKEN",
        "notify.x.url",
        "notify.x.password",
        "notify.x.token",
    }
    assert mark not in repr(found)


def test_a_group_knows_its_vms_while_they_are_off(host: Host) -> None:
    text = SHORTEST.replace("[target.main]", 'except = ["*-test"]\n[target.main]')
    found = host.load(text, found={"all": ["old9", "db1", "a-test", "../x"], "gone": ["y"]})
    assert names(found) == ["db1", "old9", "web-1", "web-2"]
    assert vm(found, "old9").socket == host.socket("old9.qmp")


def test_the_star_is_a_name_with_what_stands_before_it_and_the_braces_alone(host: Host) -> None:
    bind(host.run, "qmp-a.sock", "qmp-b.sock")
    bind(host.run / "c", "monitor")
    found = host.load(
        SHORTEST.replace("*.qmp", "web-*.qmp"),
        '[group.b]\nsockets = "/run/qemu/qmp-{vm}.sock"',
        '[group.c]\nsockets = "/run/qemu/*/monitor"',
    )
    assert names(found) == ["a", "b", "c", "web-1", "web-2"]
    assert {each.name: each.group for each in found.vms}["c"] == "c"


def test_two_groups_that_find_one_vm_switch_off_that_vm_alone(host: Host) -> None:
    more = '[group.web]\nsockets = "/run/qemu/web-1*.qmp"'
    found = host.load(SHORTEST, more)
    assert found.is_usable
    assert found.invalid == ("vm.web-1",)
    assert names(found) == ["db1", "web-2"]
    assert "group.all, group.web" in str(found.faults[0])
    found = host.load(SHORTEST, more, '[vm.web-1]\nsocket = "/run/qemu/web-1.qmp"')
    assert not found.invalid
    assert vm(found, "web-1").group == ""


def test_a_table_with_a_socket_takes_its_vm_out_of_groups(host: Host) -> None:
    found = host.load(SHORTEST, '[vm.database]\nsocket = "/run/qemu/db1.qmp"')
    assert names(found) == ["database", "web-1", "web-2"]
    assert not found.uncovered


def test_an_invalid_vm_is_not_taken_by_its_group(host: Host) -> None:
    found = host.load(SHORTEST, "[vm.db1]\nscedule = '02:30'")
    assert names(found) == ["web-1", "web-2"]
    assert not found.uncovered


def test_an_invalid_group_costs_its_vms_alone(host: Host) -> None:
    found = host.load(
        SHORTEST.replace("*.qmp", "web-*.qmp"),
        "[group.db]\nsockets = '/run/qemu/db*.qmp'\nquiesce = 'x'\n[vm.db1]\nenabled = true",
    )
    assert names(found) == ["web-1", "web-2"]
    assert found.invalid == ("group.db",)
    assert not found.uncovered


def test_sockets_that_nobody_takes_are_uncovered(host: Host) -> None:
    text = SHORTEST.replace("*.qmp", "web-*.qmp")
    assert host.load(text).uncovered == (host.socket("db1.qmp"),)
    assert host.load(text, "[run]\nwatch = []").uncovered == ()
    found = host.load(text, '[run]\nwatch = ["/run/qemu/*"]')
    assert found.uncovered == (host.socket("db1.qmp"), host.socket("web-1.qga"))
    found = host.load(
        text, '[defaults]\nagent = "/run/qemu/{vm}.qga"', '[run]\nwatch = ["/run/qemu/*"]'
    )
    assert found.uncovered == (host.socket("db1.qmp"),)


def test_a_target_that_is_wrong_leaves_the_others(host: Host) -> None:
    wrong = '[target.x]\nlocation = "restic:/r"\nsweap = {}'
    found = host.load(SHORTEST, wrong, '[vm.db1]\ntargets = ["x"]')
    assert set(found.invalid) == {"target.x", "vm.db1"}
    assert names(found) == ["web-1", "web-2"]


def test_a_configuration_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    found = load(tmp_path / "none.toml")
    assert not found.is_usable
    assert "config example" in str(found.faults[0])


def test_a_vm_has_its_group_and_host_in_places(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTIC_HOST", "kvm3")
    found = host.load(SHORTEST, '[vm.db1]\nscratch = "/s/{host}/{group}/{vm}"')
    assert vm(found, "db1").scratch == "/s/kvm3/all/db1"


TOML_VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(
            ["", "auto", "7d", "20M", "5%", "02:30", "/run/{vm}", "*", "restic:/r", "mail"]
        ),
        st.just(datetime(2026, 1, 1)),  # noqa: DTZ001 - as TOML has them
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
KNOWN = sorted({row.name for section in table.SECTIONS for row in section.all_rows})
TABLES = st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=8), TOML_VALUES, max_size=6)
KINDS = st.sampled_from(["run", "defaults", "metrics", "group", "vm", "target", "notify", "x"])
DOCUMENTS = st.dictionaries(
    KINDS,
    TABLES
    | st.dictionaries(st.sampled_from(["a", "db1", "../x", ""]), TABLES, max_size=3)
    | TOML_VALUES,
    max_size=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DOCUMENTS)
def test_any_tables_are_a_configuration_or_faults(host: Host, document: dict[str, Any]) -> None:
    with patch.object(files, "_parsed", lambda _path, _faults: document):
        found = load_all(host.file)
    list(warnings(found))
    list(everything(found))
    assert all(each.sentence for each in found.configuration.faults)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80) | st.binary(max_size=40).map(repr))
def test_any_text_is_a_configuration_or_faults(host: Host, text: str) -> None:
    host.file.write_text(text, "utf-8", "surrogatepass")
    assert isinstance(load(host.file), Configuration)


def test_the_example_can_be_used_line_by_line(host: Host) -> None:
    lines = example().splitlines()
    assert not [each for each in lines if each and not each.startswith("#")]
    used = "\n".join(
        each[1:] for each in lines if each.startswith("#") and each[1:2] not in {"", " "}
    )
    found = host.load(used.replace("/backup/{vm}", "restic:/r"))
    assert problems(found) == []
    assert found.groups
    assert found.notify[0].on == frozenset(Event) - {Event.ALWAYS}


def test_the_reference_page_is_that_of_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"
    assert page.read_text() == reference(), "Run scripts/configuration-page.py."


def test_the_schema_has_every_key() -> None:
    made = schema()
    assert set(made["properties"]) == {*SINGLE, *NAMED}
    target = made["properties"]["target"]["additionalProperties"]
    assert target["required"] == ["location"]
    assert set(target["properties"]) == {row.name for row in table.TARGET}
    assert json.loads(json.dumps(made)) == made


def test_what_is_shown_says_where_it_is_from(host: Host) -> None:
    host.load(SHORTEST, "[defaults]\nretry = { times = 5 }", "[vm.db1]\nretry = { wait = '1m' }")
    loaded = load_all(host.file)
    shown = {each.key: each for each in of_vm(loaded, vm(loaded.configuration, "db1"))}
    assert (shown["retry.times"].value, shown["retry.times"].source) == (5, "defaults")
    assert (shown["retry.wait"].value, shown["retry.wait"].source) == ("1m", "vm.db1")
    assert shown["retry.wait"].file.endswith("conf.d/2.toml")
    assert (shown["schedule"].value, shown["schedule"].source) == ("02:30", "default")
    assert shown["socket"].source == "group.all"
    assert shown["location of main"].value == "/backup/db1"


def test_what_may_be_a_secret_is_not_shown(host: Host) -> None:
    mark = "hunter2marker"
    host.load(
        SHORTEST,
        f"""
        [notify.a]
        type = "webhook"
        url = "https://hooks.example.org/services/{mark}"
        [notify.b]
        type = "command"
        command = ["/usr/bin/alarm", "{mark}"]
        password = {{ command = ["pass", "{mark}"] }}
        """,
    )
    said = str([each.value for each in everything(load_all(host.file))])
    assert mark not in said
    assert "https://hooks.example.org/…" in said


def test_warnings_are_of_what_may_be_other_than_wanted(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    secret = host.file.parent / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    host.load(
        SHORTEST,
        f"""
        [group.old]
        sockets = "/run/qemu/*.old"
        [target.x]
        location = "restic:/r"
        password = {{ file = "{secret}" }}
        environment = {{ AWS_SECRET_ACCESS_KEY = {{ credential = "nowhere" }} }}
        [vm.db1]
        schedule = "2020-01-01"
        [vm.web-1]
        enabled = false
        """,
    )
    host.file.chmod(0o666)
    found = {each.key: each.sentence for each in warnings(load_all(host.file))}
    assert "finds no socket" in found["group.old"]
    assert "no `keep`" in found["target.x"]
    assert "0644" in found["target.x.password"]
    assert "LoadCredential" in found["target.x.environment.AWS_SECRET_ACCESS_KEY"]
    assert "will ever come" in found["vm.db1.schedule"]
    assert "not enabled" in found["vm.web-1"]
    assert "nobody is told" in found["notify"]
    assert "0666" in found[""]


def test_what_removes_points_of_repositories_is_missed_before_it_is_needed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = '[target.x]\nlocation = "restic:/r"\nkeep = { last = 5 }\n'
    host.load(SHORTEST, more)
    monkeypatch.setenv("PATH", str(host.file.parent))
    found = [each.key for each in warnings(load_all(host.file)) if "restic" in each.sentence]
    assert found == ["target.x.keep"]
