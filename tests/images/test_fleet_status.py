# SPDX-License-Identifier: Apache-2.0
"""`status`, `history` and `notify` as an administrator meets them, on targets with points and a configuration."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lab import cli
from lab.sinks import mail_server
from lab.sockets import bind
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Attempt, Holding, Work
from stock.data_centre import DataCentre

USAGE = 2
OK, WARNING, CRITICAL, UNKNOWN = range(4)
NOW = datetime.now(UTC)
MARKER = "correct horse battery staple"
"""The repository's password, which nobody is to see."""


class Host:
    """A host with a configuration, three VMs whose sockets are plain files, and a repository."""

    def __init__(self, folder: Path, now: datetime) -> None:
        self.folder = folder
        self.centre = DataCentre(folder / "centre", vms=3, points=2, now=now)
        self.environment = {
            **self.centre.make(),
            "XDG_STATE_HOME": str(folder / "state"),
            "QMPBACKUP_CONFIG": str(folder / "config.toml"),
        }
        (folder / "password").write_text(MARKER)
        (folder / "password").chmod(0o600)
        for name in ("RESTIC_PASSWORD",):
            del self.environment[name]
        self.sockets = folder / "s"
        self.sockets.mkdir()
        bind(self.sockets, *(f"vm{number}.qmp" for number in range(3)))
        self.configure()

    def configure(self, more: str = "") -> None:
        (self.folder / "config.toml").write_text(
            f"""
[group.all]
sockets = "{self.sockets}/*.qmp"
[defaults]
schedule = "*:00"
[target.main]
location = "restic:{self.centre.location}"
password = {{ file = "{self.folder}/password" }}
{more}
"""
        )

    @property
    def history(self) -> Path:
        return self.folder / "state" / "qmpbackup"

    def run(self, *words: str) -> cli.Result:
        return cli.run(*words, env=self.environment)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.delenv("RESTIC_PASSWORD", raising=False)
    return Host(tmp_path, datetime.now(UTC))


def attempt(vm: str, exit_code: int, reason: str = "", minutes: int = 1) -> Attempt:
    started = NOW - timedelta(minutes=minutes)
    return Attempt(Work.BACKUP, vm, "main", "r", started, NOW, exit_code, reason)


def known(host: Host, *attempts: Attempt) -> None:
    """What runs have noted: of which VM the points are."""
    with History.opened(host.history) as history:
        history.know("all", ["vm0", "vm1", "vm2"], NOW - timedelta(days=3))
        history.alive(NOW)
        for number in range(3):
            whose = host.centre.identity(number)
            seen = Holding(f"vm{number}", "main", NOW, NOW, points=2, host=whose.host)
            history.note(replace(seen, uuid=whose.uuid))
        for each in attempts:
            history.begin(each)


def test_what_is_well_is_counted_and_what_is_not_is_said(host: Host) -> None:
    known(host, attempt("vm1", 7, "The server says 503."))
    seen = host.run("status").check().out
    assert "3 VMs on" in seen.splitlines()[0]
    assert "FAILED" in seen
    assert "└ The server says 503. Since" in seen
    assert "… 2 well (--all shows them)" in seen
    assert "vm2" not in "".join(seen.splitlines()[1:])
    assert "vm2" in host.run("status", "--all").check().out
    first, *_ = host.run("status", "--json").check().objects
    assert (first["type"], first["vm"], first["state"], first["points"]) == (
        "standing",
        "vm1",
        "failed",
        2,
    )
    assert host.run("status", "nobody").code == 10


def test_nagios_hears_what_it_wants(host: Host) -> None:
    known(host)
    seen = host.run("status", "--check").check(OK)
    assert seen.out.startswith("QMPBACKUP OK - 3 VMs well | ")
    assert "ok=" in seen.out
    assert seen.out.count("\n") == 1
    known(host, attempt("vm1", 7, "503"))
    assert "WARNING - vm1 failed" in host.run("status", "--check").check(WARNING).out
    known(host, attempt("vm1", 7, "503"))
    assert "CRITICAL - vm1 failed" in host.run("status", "--check").check(CRITICAL).out
    host.run("status", "--check", "vm2").check(OK)
    (host.folder / "config.toml").write_text(
        "[group.none]\nsockets = '/nowhere/*.qmp'\n[target.main]\nlocation = '/nowhere/{vm}'\n"
    )
    assert "no VM is known" in host.run("status", "--check").check(UNKNOWN).out
    (host.folder / "config.toml").write_text("[run\n")
    assert "UNKNOWN" in host.run("status", "--check").check(UNKNOWN).out


def test_a_target_that_does_not_open_is_unknown_and_never_well(host: Host) -> None:
    known(host)
    (host.folder / "password").write_text("wrong")
    seen = host.run("status", "--check").check(UNKNOWN)
    assert "vm0 unknown" in seen.out
    assert "wrong" not in host.run("status").check().out.lower().replace("wrong password", "")


def test_a_deleted_or_broken_history_makes_nobody_unwell(host: Host) -> None:
    known(host, attempt("vm1", 0))
    # Points are a VM's if they were made of one of its name on this host.
    host.environment["RESTIC_HOST"] = host.centre.identity(0).host
    host.history.joinpath("history.db").write_bytes(b"rubbish" * 1000)
    said = host.run("status", "--check", "vm0").check(WARNING).out
    assert said.startswith("QMPBACKUP WARNING - history cannot be kept | ")
    host.history.joinpath("history.db").unlink()
    host.run("status", "--check", "vm0").check(OK)


def test_no_secret_is_in_what_is_said(host: Host) -> None:
    known(host, attempt("vm1", 7, "503"))
    for words in (("status",), ("status", "--json"), ("history",), ("history", "--json")):
        seen = host.run("--debug", *words).check()
        assert MARKER not in seen.out + seen.err


def test_the_history_is_shown_newest_first(host: Host) -> None:
    known(host, attempt("vm1", 0, minutes=9), attempt("vm1", 7, "503"), attempt("vm2", 13))
    lines = host.run("history", "vm1", "--since", "3d").check().out.splitlines()[1:]
    assert ["exit 7" in lines[0], "ok" in lines[1], len(lines)] == [True, True, 2]
    first = host.run("history", "--json").check().objects[0]
    assert (first["type"], first["vm"], first["exit_code"]) == ("attempt", "vm2", 13)
    assert host.run("history", "--since", "yesterday").code == USAGE


def test_a_unit_that_was_killed_is_told_once_and_one_that_told_it_itself_is_not(host: Host) -> None:
    with mail_server() as box:
        host.configure(
            f'[notify.ops]\ntype = "mail"\nto = ["ops@example.org"]\nsmtp = "{box.address}"\n'
        )
        unit = ("notify", "--unit-failed", "qmpbackup.service")
        host.environment["MONITOR_SERVICE_RESULT"] = "oom-kill"
        for _ in range(2):
            host.run(*unit).check()
        assert [each["Subject"].partition(": ")[2] for each in box.mails] == ["1 failed"]
        assert "want of memory" in box.mails[0].get_content()
        host.run("notify", "--test").check()
        assert "Nothing is wrong" in box.mails[1].get_content()
        with History.opened(host.history) as history:
            history.tell("run started", NOW)
            history.tell("run reported", NOW)
        host.environment |= {"MONITOR_SERVICE_RESULT": "exit-code", "MONITOR_EXIT_STATUS": "14"}
        assert "told that itself" in host.run(*unit).check().out
        assert len(box.mails) == 2
    assert host.run("notify", "--test").code == 1
    host.configure()
    assert host.run("notify", "--test").code == USAGE
