# SPDX-License-Identifier: Apache-2.0
"""Each trouble is told once, to everybody who is to hear of it, on real servers; and once when it is over."""

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest

from lab.servers import certificate
from lab.sinks import Mailbox, Web, mail_server, web_server
from qmpbackup.fleet.history import History
from qmpbackup.fleet.messages import telling
from qmpbackup.fleet.messages.notices import News, Notice
from qmpbackup.fleet.messages.notices import report as report_of
from qmpbackup.fleet.messages.telling import Scope, begun, tell
from qmpbackup.fleet.settings import Configuration, Event, Fault, NotifySettings, NotifyType, Secret
from qmpbackup.fleet.standing import Severity, Standing, State
from qmpbackup.fleet.survey import Survey

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
LATE = Standing("db1", "main", State.LATE, "The server says 503.", NOW - timedelta(days=2))
WELL = Standing("web", "main", State.OK)
MARKER = "s3cr3t-marker"


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.opened(tmp_path) as opened:
        yield opened


@pytest.fixture
def box() -> Iterator[Mailbox]:
    with mail_server() as made:
        yield made


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as made:
        yield made


def by_mail(box: Mailbox) -> NotifySettings:
    return NotifySettings("ops", NotifyType.MAIL, to=("ops@example.org",), smtp=box.address)


def reveal(secret: Secret) -> str:
    return f"{MARKER}-{secret.credential}"


def always(value: str) -> Callable[[Secret], str]:
    """A secret that is this, whichever is meant."""
    return lambda _secret: value


def of(*standings: Standing, now: datetime = NOW, exit_code: int = 0) -> News:
    return report_of(Survey(now, standings), "kvm3", exit_code=exit_code)


def test_a_trouble_is_told_once_then_again_after_a_while_and_once_when_it_is_over(
    history: History, box: Mailbox
) -> None:
    ways = [by_mail(box)]
    for minutes in (0, 15, 30, 24 * 60 - 1):
        assert (
            tell(ways, of(LATE, WELL, now=NOW + timedelta(minutes=minutes)), history, reveal) == ()
        )
    assert len(box.mails) == 1
    tell(ways, of(LATE, WELL, now=NOW + timedelta(days=1)), history, reveal)
    assert len(box.mails) == 2
    well = replace(LATE, state=State.OK, why="")
    for minutes in (0, 15):
        tell(ways, of(well, WELL, now=NOW + timedelta(days=1, minutes=minutes)), history, reveal)
    assert [each["Subject"] for each in box.mails] == [
        "qmpbackup on kvm3: 1 late",
        "qmpbackup on kvm3: 1 late",
        "qmpbackup on kvm3: 1 well again",
    ]
    text = box.mails[0].get_content()
    assert "LATE  db1 → main: The server says 503. Since 2026-11-23 12:00 UTC." in text
    assert "web" not in text
    assert "RECOVERED  db1 → main" in box.mails[2].get_content()
    assert set(box.recipients) == {"ops@example.org"}


def test_nobody_is_told_that_all_is_well(history: History, box: Mailbox) -> None:
    tell([by_mail(box)], of(WELL), history, reveal)
    assert box.mails == []
    tell([replace(by_mail(box), on=frozenset({Event.ALWAYS}))], of(WELL), history, reveal)
    assert "1 VM: 1 ok" in box.mails[0].get_content()


def test_one_message_a_run_however_much_is_wrong(history: History, box: Mailbox) -> None:
    many = [replace(LATE, vm=f"vm{number}") for number in range(250)]
    tell([by_mail(box)], of(*many), history, reveal)
    (mail,) = box.mails
    assert mail["Subject"] == "qmpbackup on kvm3: 250 late"
    assert "and 150 more" in mail.get_content()


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (State.FAILED, Event.FAILED),
        (State.UNKNOWN, Event.FAILED),
        (State.LATE, Event.LATE),
        (State.DAMAGED, Event.DAMAGED),
        (State.DEGRADED, Event.DEGRADED),
        (State.UNCOVERED, Event.UNCOVERED),
        (State.INVALID, Event.CONFIG),
    ],
)
def test_each_kind_of_trouble_is_one_message_for_those_who_want_it(
    history: History, box: Mailbox, state: State, event: Event
) -> None:
    wanted = replace(by_mail(box), on=frozenset({event, Event.RECOVERED}))
    other = replace(wanted, name="other", on=frozenset(Event) - {event, Event.ALWAYS})
    standing = replace(LATE, state=state)
    for _ in range(3):
        tell([wanted, other], of(standing), history, reveal)
    assert len(box.mails) == 1
    for _ in range(3):
        tell([wanted, other], of(replace(standing, state=State.OK)), history, reveal)
    assert len(box.mails) == 2


def test_trouble_that_becomes_another_is_told_and_not_called_well(
    history: History, box: Mailbox
) -> None:
    ways = [by_mail(box)]
    tell(ways, of(replace(LATE, state=State.FAILED)), history, reveal)
    tell(ways, of(replace(LATE, state=State.RUNNING)), history, reveal)  # nobody can say yet
    assert len(box.mails) == 1
    tell(ways, of(LATE), history, reveal)
    tell(ways, of(replace(LATE, state=State.OK)), history, reveal)
    assert [each["Subject"].partition(": ")[2] for each in box.mails] == [
        "1 failed",
        "1 late",
        "1 well again",
    ]


def test_what_is_wrong_besides_the_vms_is_told(history: History, box: Mailbox) -> None:
    fault = Fault("config.toml", "run.paralel", "unknown key")
    survey = Survey(NOW, (WELL,), faults=(fault,), trouble="The history cannot be written: full.")
    tell([by_mail(box)], report_of(survey, "kvm3"), history, reveal)
    (mail,) = box.mails
    assert "config.toml: run.paralel: unknown key" in mail.get_content()
    assert "cannot be written: full" in mail.get_content()


def test_a_way_that_fails_is_named_by_the_others_and_tried_again(
    history: History, box: Mailbox
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        dead = f"127.0.0.1:{nobody.getsockname()[1]}"
    lost = replace(by_mail(box), name="lost", smtp=dead)
    assert tell([lost], of(LATE), history, reveal) == ("lost",)
    assert tell([lost, by_mail(box)], of(LATE), history, reveal) == ("lost",)
    assert "notify.lost" in box.mails[0].get_content()
    found = replace(lost, smtp=box.address)
    assert tell([found, by_mail(box)], of(LATE), history, reveal) == ()
    assert [each["Subject"] for each in box.mails][1:] == [
        "qmpbackup on kvm3: 1 late",
        "qmpbackup on kvm3: 1 well again",
    ]


def test_a_server_that_says_nothing_is_given_up(history: History) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/hook"
        way = NotifySettings("hook", NotifyType.WEBHOOK, url=url, timeout=0.2)
        assert tell([way], of(LATE), history, reveal) == ("hook",)


def test_a_webhook_gets_json_and_its_token(history: History, web: Web) -> None:
    way = NotifySettings("hook", NotifyType.WEBHOOK, url=f"{web.url}/hook", token=Secret("t"))
    tell([way], of(LATE, exit_code=14), history, reveal)
    (asked,) = web.asked
    said = json.loads(asked.body)
    assert (said["type"], said["host"], said["exit_code"]) == ("message", "kvm3", 14)
    assert said["notices"][0]["subject"] == "db1 → main"
    assert asked.headers["Authorization"] == f"Bearer {MARKER}-t"


def test_ntfy_gets_a_title_and_text(history: History, web: Web) -> None:
    way = NotifySettings("push", NotifyType.NTFY, url=f"{web.url}/backups")
    tell([way], of(LATE), history, reveal)
    (asked,) = web.asked
    assert asked.path == "/backups"
    assert asked.headers["Title"] == "qmpbackup on kvm3: 1 late"
    assert "503" in asked.body.decode()


def test_healthchecks_hears_of_each_beginning_and_end(history: History, web: Web) -> None:
    way = NotifySettings("ping", NotifyType.HEALTHCHECKS, url=Secret("url"))

    def url(secret: Secret) -> str:
        del secret
        return f"{web.url}/uuid"

    for report in (of(WELL), of(LATE), of(LATE), of(LATE, exit_code=14), of(WELL, exit_code=3)):
        begun([way], history, NOW, url)
        tell([way], report, history, url)
    ends = ["/uuid/0", "/uuid/1", "/uuid/1", "/uuid/14", "/uuid/0"]
    assert web.paths == [path for end in ends for path in ("/uuid/start", end)]


def test_a_command_gets_json_and_no_shell(history: History, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("/bin/sh", "-c", '{ cat; echo; echo "$QMPBACKUP_TITLE"; } >"$1"', "sh", str(out))
    way = NotifySettings("own", NotifyType.COMMAND, command=words)
    assert tell([way], of(LATE), history, reveal) == ()
    said, title = out.read_text().removesuffix("\n").split("\n")
    assert json.loads(said)["notices"][0]["event"] == "late"
    assert title == "qmpbackup on kvm3: 1 late"
    failing = replace(way, name="failing", command=("/bin/false",))
    assert tell([failing], of(LATE), history, reveal) == ("failing",)


def test_no_secret_is_said_by_a_way_that_fails(
    history: History, caplog: pytest.LogCaptureFixture
) -> None:
    with web_server(status=500) as web, caplog.at_level(logging.DEBUG):
        for kind in (NotifyType.WEBHOOK, NotifyType.NTFY, NotifyType.HEALTHCHECKS):
            url = f"{web.url}/{MARKER}"
            way = NotifySettings("hook", kind, url=Secret("url"), token=Secret("t"))
            assert tell([way], of(LATE), history, always(url)) == ("hook",)
        refused = NotifySettings("hook", NotifyType.WEBHOOK, url=Secret("url"))
        assert tell([refused], of(LATE), history, always(f"ftp://{MARKER}")) == ("hook",)
    assert "The server says 500" in caplog.text
    assert MARKER not in caplog.text


def test_a_password_goes_over_no_wire_in_clear(history: History, box: Mailbox) -> None:
    way = replace(by_mail(box), user="ops", password=Secret("mail"))
    assert tell([way], of(LATE), history, reveal) == ("ops",)
    assert box.mails == []


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    return certificate(tmp_path / "mail.pem")


def test_a_server_with_encryption_gets_the_mail_and_the_password_over_it(
    history: History, pem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    with mail_server(certificate=pem) as box:
        assert tell([by_mail(box)], of(LATE), history, reveal) == ()
        way = replace(by_mail(box), name="more", user="ops", password=Secret("mail"))
        assert tell([way], of(LATE), history, reveal) == ()
    assert [each["Subject"] for each in box.mails] == ["qmpbackup on kvm3: 1 late"] * 2
    assert box.logins == [("ops", f"{MARKER}-mail")]


def test_a_server_whose_certificate_nobody_trusts_gets_neither_mail_nor_password(
    history: History, pem: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mail_server(certificate=pem) as box, caplog.at_level(logging.WARNING):
        way = replace(by_mail(box), user="ops", password=Secret("mail"))
        assert tell([way], of(LATE), history, reveal) == ("ops",)
    assert (box.mails, box.logins) == ([], [])
    assert "certificate" in caplog.text.lower()
    assert MARKER not in caplog.text


@pytest.mark.filterwarnings("ignore")  # Apprise's own
def test_apprise_is_given_all_addresses_where_it_is_installed(
    history: History, web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    way = NotifySettings("chat", NotifyType.APPRISE, url=Secret("url"))
    address = f"{web.url.replace('http://', 'json://')}/{MARKER}"
    failed = tell([way], of(LATE), history, always(address))
    if find_spec("apprise") is None:
        assert failed == ("chat",)
        assert "pip install 'qmpbackup[apprise]'" in caplog.text
    else:
        assert failed == ()
        (asked,) = web.asked
        assert json.loads(asked.body)["title"] == "qmpbackup on kvm3: 1 late"
        unknown = tell([replace(way, name="x")], of(LATE), history, always(f"x{MARKER}"))
        assert unknown == ("x",)
    assert MARKER not in caplog.text


def test_nothing_of_a_way_is_loaded_until_it_sends() -> None:
    """Neither what sends mail, nor what Apprise brings."""
    code = (
        "import sys, qmpbackup.fleet.messages.telling, qmpbackup.fleet.run.once\n"
        "assert not {'apprise', 'smtplib', 'requests'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_thing_alone_makes_nothing_else_well(history: History, box: Mailbox) -> None:
    ways = [by_mail(box)]
    tell(ways, of(LATE), history, reveal)
    killed = Notice(Event.FAILED, "qmpbackup.service", "It was killed.", NOW, Severity.CRITICAL)
    for _ in range(2):
        tell(ways, News("kvm3", NOW, (killed,)), history, reveal, scope=Scope.ONE)
    assert [each["Subject"].partition(": ")[2] for each in box.mails] == ["1 late", "1 failed"]
    tell(ways, of(LATE), history, reveal)
    assert "RECOVERED  qmpbackup.service" in box.mails[2].get_content()


def test_a_configuration_that_stops_all_is_told_by_the_run_and_not_by_its_unit_as_well(
    history: History, box: Mailbox
) -> None:
    fault = Fault("config.toml", "", "is no TOML (line 3)")
    for _ in range(2):
        begun((), history, NOW, reveal)
        news = report_of(Survey(NOW, faults=(fault,)), "kvm3", exit_code=2)
        tell([by_mail(box)], news, history, reveal, scope=Scope.CONFIG)
        assert telling.has_reported(history)
    assert [each["Subject"].partition(": ")[2] for each in box.mails] == ["1 config"]
    tell([by_mail(box)], of(WELL), history, reveal)
    assert "RECOVERED  configuration" in box.mails[1].get_content()


def test_a_test_is_not_remembered(history: History, box: Mailbox) -> None:
    way = telling.silenced(by_mail(box))
    for _ in range(2):
        tell([way], telling.tested("kvm3", NOW), history, reveal, scope=Scope.TEST)
    tell([by_mail(box)], of(WELL), history, reveal)
    assert len(box.mails) == 2


def test_a_run_has_reported_only_what_it_told_itself(history: History, box: Mailbox) -> None:
    assert not telling.has_reported(history)
    begun([], history, NOW, reveal)
    assert not telling.has_reported(history)
    tell([by_mail(box)], of(LATE, now=NOW + timedelta(minutes=1)), history, reveal)
    assert telling.has_reported(history)
    begun([], history, NOW + timedelta(minutes=2), reveal)
    assert not telling.has_reported(history)


def test_who_is_to_be_told_is_known_while_the_configuration_is_broken(
    tmp_path: Path, box: Mailbox
) -> None:
    way = replace(by_mail(box), url=Secret("url"))
    telling.remember(tmp_path, Configuration(notify=(way,)))
    broken = Configuration(faults=(Fault("config.toml", "", "is no TOML"),))
    assert telling.to_be_told(tmp_path, broken) == (way,)
    assert telling.to_be_told(tmp_path, Configuration()) == ()
    assert telling.to_be_told(tmp_path / "nowhere", broken) == ()


def test_a_run_that_never_came_to_begin_is_not_taken_for_the_one_before(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVOCATION_ID", "first")
    begun([], history, NOW, reveal)
    tell([], of(WELL), history, reveal)
    assert telling.has_reported(history, "first")
    assert not telling.has_reported(history, "second")
    monkeypatch.setenv("INVOCATION_ID", "second")
    tell([], of(WELL), history, reveal, scope=Scope.BROKEN_OFF)
    assert telling.has_reported(history, "second")
    assert not telling.has_reported(history, "first")


def test_whatever_a_way_is_called_it_is_told_what_is_well_again_and_what_comes_back(
    history: History, box: Mailbox
) -> None:
    ways = [replace(by_mail(box), name="a|b")]
    for minutes, standing in enumerate((LATE, replace(LATE, state=State.OK), LATE)):
        tell(ways, of(standing, now=NOW + timedelta(minutes=minutes)), history, reveal)
    said = [each["Subject"].partition(": ")[2] for each in box.mails]
    assert said == ["1 late", "1 well again", "1 late"]
