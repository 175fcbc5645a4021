# SPDX-License-Identifier: Apache-2.0
"""Whatever fails, people are told of it once, however often runs go by, and once when it is well again: counted
on a mail server and a web server. No secret is in what they get."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lab import cli
from lab.sinks import Mailbox, Web, mail_server, web_server
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Attempt, Work
from stock.data_centre import DataCentre

MARKER = "marker-of-a-secret"
KILLED = ("notify", "--unit-failed", "qmpbackup.service")


@dataclass
class Host:
    """A host with one VM, whose point is two hours old, and somebody to be told by mail and by a webhook."""

    folder: Path
    centre: DataCentre
    environment: dict[str, str]
    box: Mailbox
    web: Web

    def configure(
        self, more: str = "", location: str = "", of_vm: str = "", schedule: str = "*-02-29 03:00"
    ) -> None:
        """Write the configuration."""
        (self.folder / "config.toml").write_text(
            f"""
[vm.vm0]
socket = "{self.folder}/s/vm0.qmp"
schedule = "{schedule}"
{of_vm}
[target.main]
location = "restic:{location or self.centre.location}"
password = {{ file = "{self.folder}/password" }}
verify = {{ every = "" }}
[notify.mail]
type = "mail"
to = ["ops@example.org"]
smtp = "{self.box.address}"
[notify.hook]
type = "webhook"
url = {{ file = "{self.folder}/url" }}
{more}
"""
        )

    def run(self, *words: str) -> cli.Result:
        result = cli.run("--debug", *words, env=self.environment)
        assert MARKER not in result.out + result.err
        return result

    def noted(self, work: Work, exit_code: int) -> None:
        """What a run has done, which takes a VM that can boot, or real damage, to do again."""
        now = datetime.now(UTC)
        with History.opened(self.folder / "state" / "qmpbackup") as history:
            history.begin(Attempt(work, "vm0", "main", "r", now, now, exit_code, "As a test says."))

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.box.mails), len(self.web.asked)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.delenv("RESTIC_PASSWORD", raising=False)
    made_at = datetime.now(UTC) - timedelta(hours=2)
    centre = DataCentre(tmp_path / "centre", vms=1, points=2, now=made_at)
    environment = {
        **centre.make(),
        "RESTIC_HOST": centre.identity(0).host,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "QMPBACKUP_CONFIG": str(tmp_path / "config.toml"),
    }
    secret = environment.pop("RESTIC_PASSWORD")
    (tmp_path / "s").mkdir()
    with ExitStack() as stack:
        box = stack.enter_context(mail_server())
        web = stack.enter_context(web_server())
        for name, text in (("password", secret), ("url", f"{web.url}/{MARKER}")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o600)
        stack.enter_context(listening(tmp_path / "s" / "vm0.qmp"))  # and says nothing
        made = Host(tmp_path, centre, environment, box, web)
        made.configure()
        assert "Nothing is due" in made.run("run").check().out
        assert made.counts == (0, 0)
        yield made


def listening(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.bind(str(path))
    found.listen()
    return found


def a_broken_configuration(host: Host) -> None:
    (host.folder / "config.toml").write_text("[run\n")


def a_typo(host: Host) -> None:
    host.configure('[vm.typo]\nsocket = "/none"\nscedule = "02:30"')


def a_target_that_does_not_open(host: Host) -> None:
    host.configure(location="/proc/nowhere")


def metrics_that_cannot_be_written(host: Host) -> None:
    host.configure(f'[metrics]\ntextfile = "{host.folder}/none/x.prom"')


def a_vm_that_nobody_backs_up(host: Host) -> None:
    listening(host.folder / "s" / "new.qmp").close()


@pytest.mark.parametrize(
    "trouble",
    [
        a_broken_configuration,
        metrics_that_cannot_be_written,
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (a_typo, a_target_that_does_not_open, a_vm_that_nobody_backs_up)
        ),
    ],
)
def test_each_trouble_is_told_once_and_once_when_it_is_over(
    host: Host, trouble: Callable[[Host], None]
) -> None:
    trouble(host)
    for _ in range(2):
        host.run("run")
    assert host.counts == (1, 1)
    (host.folder / "s" / "new.qmp").unlink(missing_ok=True)
    host.configure()
    for _ in range(2):
        host.run("run").check()
    assert host.counts == (2, 2)
    assert "well again" in host.box.mails[1]["Subject"]
    assert_secrets_are_nowhere(host)


@pytest.mark.parametrize(
    ("work", "exit_code"),
    [(Work.BACKUP, 6), (Work.BACKUP, -9), (Work.VERIFY, 8), (Work.VERIFY, 7), (Work.DRILL, 1)],
)
@pytest.mark.slow
def test_whatever_work_fails_is_told_once_and_once_when_it_went_well(
    host: Host, work: Work, exit_code: int
) -> None:
    for code in (exit_code, 0):
        host.noted(work, code)
        for _ in range(2):
            host.run("run").check()
    assert host.counts == (2, 2)
    assert "As a test says" in host.box.mails[0].get_content()
    assert "well again" in host.box.mails[1]["Subject"]


def test_a_run_that_was_killed_is_told_once_and_is_over_with_the_next(host: Host) -> None:
    host.environment["MONITOR_SERVICE_RESULT"] = "oom-kill"
    for _ in range(2):
        host.run(*KILLED).check()
    assert host.counts == (1, 1)
    for _ in range(2):
        host.run("run").check()
    assert host.counts == (2, 2)


@pytest.mark.slow
def test_points_that_are_too_old_are_told_once_and_once_when_all_is_well(host: Host) -> None:
    host.configure(schedule="*:00", of_vm='grace = "0s"\nretry = { times = 0 }')
    for _ in range(2):
        host.run("run")
    assert host.counts == (1, 1)
    assert host.box.mails[0]["Subject"].endswith(": 1 late")
    host.noted(Work.BACKUP, 0)
    host.configure()
    for _ in range(2):
        host.run("run").check()
    assert host.counts == (2, 2)


def assert_secrets_are_nowhere(host: Host) -> None:
    """Neither in what was sent, but for the address that it was sent to, nor in what is kept."""
    for mail in host.box.mails:
        assert MARKER not in mail.as_string()
    for asked in host.web.asked:
        assert MARKER not in json.dumps(json.loads(asked.body))
    secret = (host.folder / "password").read_text()
    for path in (host.folder / "state").rglob("*"):
        assert not path.is_file() or MARKER.encode() not in path.read_bytes()
        assert not path.is_file() or secret.encode() not in path.read_bytes()
