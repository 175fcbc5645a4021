# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads: judged by its own tools, where they are installed, and never jumping to zero."""

import json
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from qmpbackup.fleet.history import History
from qmpbackup.fleet.looking import Sight, Sightings
from qmpbackup.fleet.metrics import ALL, PREFIX, rendered, write
from qmpbackup.fleet.records import Attempt, Holding, Work
from qmpbackup.fleet.settings import Configuration, TargetSettings, VmSettings
from qmpbackup.fleet.survey import judge
from qmpbackup.plan.room import Space

DIST = Path(__file__).parents[3] / "dist"
RULES = DIST / "prometheus" / "qmpbackup.rules.yml"
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
NIGHT = datetime(2026, 11, 25, 2, 31, tzinfo=UTC)
HOLDING = Holding("db1", "main", NOW, NIGHT, "p1", "agent", 23)
BACKUP = Attempt(
    Work.BACKUP,
    "db1",
    "main",
    "r",
    NIGHT,
    NIGHT + timedelta(seconds=14),
    0,
    added=7,
    read=9,
    pause=0.004,
)
CONFIGURATION = Configuration(
    vms=(VmSettings("db1", "tcp:127.0.0.1:1", targets=("main",), schedule=("02:30 UTC",)),),
    targets=(TargetSettings("main", "/backup/{vm}"),),
    uncovered=("/run/new7.qmp",),
)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.opened(tmp_path / "state") as opened:
        opened.alive(NOW)
        for each in (BACKUP, replace(BACKUP, work=Work.VERIFY), replace(BACKUP, work=Work.DRILL)):
            opened.begin(each)
        yield opened


def values(history: History, holding: Holding = HOLDING) -> dict[str, float]:
    """The file as Prometheus takes it apart."""
    sights = (Sight("main", Space(1, "/backup", 1000, 400)),)
    survey = judge(CONFIGURATION, history, Sightings((holding,), sights), NOW)
    lines = rendered(survey, history).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_each_metric_is_there_and_says_what_it_is_of(history: History) -> None:
    found = values(history)
    assert {re.sub(r"\{.*", "", name) for name in found} == {PREFIX + name for name in ALL}
    of = '{target="main",vm="db1"}'
    assert found[f"{PREFIX}point_timestamp_seconds{of}"] == NIGHT.timestamp()
    deadline = datetime(2026, 11, 26, 14, 30, tzinfo=UTC).timestamp()
    assert found[f"{PREFIX}point_deadline_timestamp_seconds{of}"] == deadline
    assert found[f"{PREFIX}backup_duration_seconds{of}"] == 14
    assert found[f'{PREFIX}vms{{state="ok"}}'] == 1
    assert found[f'{PREFIX}vms{{state="uncovered"}}'] == 1
    assert found[f'{PREFIX}target_free_bytes{{target="main"}}'] == 400


def test_failures_change_nothing_that_they_do_not_mean(history: History) -> None:
    before = values(history)
    for _ in range(2):
        history.begin(replace(BACKUP, exit_code=7, added=0, read=0, pause=0.0, reason="503"))
    after = values(history, replace(HOLDING, problem="It does not open."))
    changed = {name for name in before if before[name] != after[name]}
    of = '{target="main",vm="db1"}'
    assert {f"{PREFIX}attempt_exit_code{of}", f"{PREFIX}attempt_failures{of}"} <= changed
    assert not {name for name in changed if re.match(rf"{PREFIX}(point|backup_)", name)}
    assert before.keys() == after.keys()


def test_the_file_can_be_read_by_others_and_is_whole(history: History, tmp_path: Path) -> None:
    survey = judge(CONFIGURATION, history, Sightings((HOLDING,)), NOW)
    path = tmp_path / "qmpbackup.prom"
    for _ in range(2):
        write(path, survey, history)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [each.name for each in tmp_path.glob("qmpbackup.*")] == ["qmpbackup.prom"]


def test_each_metric_of_the_rules_and_the_dashboard_exists() -> None:
    known = {PREFIX + name for name in ALL}
    rules = set(re.findall(rf"{PREFIX}\w+", RULES.read_text()))
    dashboard = json.loads((DIST / "grafana" / "qmpbackup.json").read_text())
    shown = set(re.findall(rf"{PREFIX}\w+", json.dumps(dashboard)))
    assert rules <= known
    assert len(shown) > 10
    assert shown <= known


def test_each_metric_is_described() -> None:
    page = DIST.parent / "docs" / "reference" / "metrics.md"
    described = set(re.findall(rf"^\| `{PREFIX}(\w+)", page.read_text(), re.MULTILINE))
    assert described == set(ALL)


def installed(program: str) -> str:
    """A program of Debian's; `make test-all` installs it."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def test_promtool_finds_nothing_to_say_against_the_metrics(history: History) -> None:
    promtool = installed("promtool")
    survey = judge(CONFIGURATION, history, Sightings((HOLDING,)), NOW)
    data = rendered(survey, history)
    done = subprocess.run(
        [promtool, "check", "metrics"], input=data, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    "words", [["check", "rules", str(RULES)], ["test", "rules", "qmpbackup.test.yml"]]
)
def test_promtool_finds_the_alerts_right(words: list[str]) -> None:
    done = subprocess.run(
        [installed("promtool"), *words],
        cwd=RULES.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_node_exporter_reads_the_file(history: History, tmp_path: Path) -> None:
    exporter = installed("prometheus-node-exporter")
    folder = tmp_path / "textfile"
    folder.mkdir()
    write(
        folder / "qmpbackup.prom",
        judge(CONFIGURATION, history, Sightings((HOLDING,)), NOW),
        history,
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [
        exporter,
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={folder}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "Listening" in line or "listening" in line or "TLS is disabled" in line:
                    break
            text = _scraped(f"http://127.0.0.1:{port}/metrics")
        finally:
            process.kill()
    assert 'qmpbackup_points{target="main",vm="db1"} 23' in text
    assert "node_textfile_scrape_error 0" in text


def _scraped(url: str) -> str:
    while True:  # it has said that it listens, or is about to
        try:
            with urlopen(url, timeout=60) as answer:  # noqa: S310 - loopback
                return str(answer.read().decode())
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
