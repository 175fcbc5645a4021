# SPDX-License-Identifier: Apache-2.0
"""A run over many VMs, or what it has started, is killed at any stage: nothing is begun twice, no alarm is lost,
and the next run goes on."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.disks import MIB, Disk, create
from lab.moments import killed_at
from lab.qemu import Qemu
from lab.repositories import Repository
from lab.sinks import Web, web_server

SOME_FAILED = 14
KILLED = -9
WARNING, CRITICAL = 1, 2
VMS = ("db1", "web1")


@dataclass
class Host:
    """A host with two VMs and one that always fails, a target, and a server that is told."""

    folder: Path
    web: Web
    tables: dict[str, str]
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, *words: cli.Argument, **moment: str) -> cli.Result:
        """`run` with the tables as they are now."""
        path = self.folder / "config.toml"
        path.write_text("\n".join(f"[{name}]\n{text}" for name, text in self.tables.items()))
        return self.say("run", *words, **moment)

    def say(self, command: str, *words: cli.Argument, **moment: str) -> cli.Result:
        env = {"XDG_STATE_HOME": str(self.folder / "state"), **self.variables, **moment}
        return cli.run(command, "--config", self.folder / "config.toml", *words, env=env)

    def later(self) -> None:
        """Let twenty minutes pass, as far as the history tells."""
        with closing(sqlite3.connect(self.folder / "state/qmpbackup/history.db")) as history:
            history.execute("UPDATE attempt SET started = started - 1200000000")
            history.execute("UPDATE attempt SET ended = ended - 1200000000")
            history.commit()

    def points(self) -> Counter[str]:
        """How many points there are of each VM, by the target itself."""
        found: Counter[str] = Counter()
        for held in self.say("status", "--json", "--all").objects:
            if held.get("type") == "standing":
                found[held["vm"]] += held["points"] or 0
        return +found

    @property
    def told(self) -> list[bytes]:
        """Messages that say that something is wrong."""
        return [each.body for each in self.web.asked]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        vms = {
            name: stack.enter_context(Qemu([Disk("vda", create(tmp_path / name, MIB))], name=name))
            for name in VMS
        }
        web = stack.enter_context(web_server())
        tables = {f"vm.{name}": f'socket = "{vm.socket}"' for name, vm in vms.items()}
        tables |= {
            "defaults": 'schedule = "*-01-01 00:00"\nretry = { times = 0 }\nlimits = { pause = "1h" }',
            "vm.bad": f'socket = "{vms["db1"].socket}"\ninclude = ["nothing"]',
            "target.main": f'location = "{tmp_path}/backup/{{vm}}"\nverify = {{ every = "" }}',
            "notify.ops": f'type = "webhook"\nurl = "{web.url}"',
        }
        yield Host(tmp_path, web, tables)


PREPARED = r"^open \S*notify\.json"
CHILD = r"^subprocess\.Popen .* backup "
COMMITTED = r"^os\.rename \S+ \S+\.json "


def slow(*of: object, name: str) -> Any:
    return pytest.param(*of, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("command", "events", "parent"),
    [
        slow("run", [PREPARED], False, name="planning"),
        slow("run", [CHILD], False, name="before a child"),
        slow("backup", ["^socket.connect"], True, name="with a child"),
        slow("backup", ["^open .*vm.json"], True, name="as a target is made"),
        pytest.param("backup", [COMMITTED], True, id="as a point is committed"),
        slow("backup", [COMMITTED, "^os.remove|^open|^os.unlink"], True, name="after that"),
        pytest.param("run", ["^socket.connect .*127.0.0.1"], False, id="as people are told"),
    ],
)
def test_a_run_is_killed(host: Host, command: str, events: list[str], parent: bool) -> None:
    moment = killed_at(host.folder, command, events, parent=parent)
    assert host.run(**moment).code == KILLED
    goes_on_as_if_nothing_had_been(host)


@pytest.mark.parametrize(
    "events",
    [
        slow([r"^open "], name="at its beginning"),
        slow([COMMITTED], name="as a point is committed"),
        pytest.param([COMMITTED, "^os.remove|^open|^os.unlink"], id="after that"),
    ],
)
def test_a_backup_is_killed(host: Host, events: list[str]) -> None:
    ended = host.run("--json", **killed_at(host.folder, "backup", events)).check(SOME_FAILED)
    assert KILLED in {each["exit_code"] for each in ended.objects}
    goes_on_as_if_nothing_had_been(host)


def goes_on_as_if_nothing_had_been(host: Host) -> None:
    """One point of each VM, none twice; the one that fails is told once, and never called well."""
    assert host.say("status", "--check").code in {WARNING, CRITICAL}
    host.later()
    host.run()
    assert host.points() == Counter(dict.fromkeys(VMS, 1)), "none is missing, none made twice"
    host.later()
    third = host.run()
    assert "Nothing is due" in third.out, third
    assert sum(b"bad" in body for body in host.told) == 1, "the alarm came, and once"
    assert not any(b"bad" in line for body in host.told for line in body.split(b"RECOVERED")[1:])
    assert host.say("status", "--check").code in {WARNING, CRITICAL}


@pytest.mark.slow
@pytest.mark.parametrize("parent", [True, False], ids=["the run", "the command"])
@pytest.mark.parametrize("command", ["prune", "sweep", "verify", "drill"])
def test_what_follows_a_backup_is_killed(host: Host, command: str, parent: bool) -> None:
    """It is done by the next run that is long enough after it."""
    made = Repository(f"{host.folder}/repository", host.folder, "secret")
    (host.folder / "password").write_text("secret")
    (host.folder / "password").chmod(0o600)
    cli.run("init", "--target", str(made), env=made.environment).check()
    del host.tables["vm.bad"]
    host.tables["target.main"] = f"""location = "{made}"
password = {{ file = "{host.folder}/password" }}
keep = {{ last = 1 }}
verify = {{ every = "7d" }}"""
    host.tables["defaults"] += '\ndrill = { every = "7d", timeout = "1s" }'
    if command in {"verify", "drill"}:  # which are of points that are there
        host.run(**killed_at(host.folder, "verify", ["^no such event"]))
    host.run(**killed_at(host.folder, command, ["^open "], parent=parent))
    words = {"prune": "forget"}.get(command, command)
    killed = [each for each in works(host, words) if each == KILLED]
    assert killed, "it is known to have been killed"
    host.later()
    host.run(*(["--all"] if command == "prune" else []))
    assert works(host, words)[0] != KILLED, "and is done again"
    assert host.points() == Counter(dict.fromkeys(VMS, 1))


def works(host: Host, work: str) -> list[int]:
    """How this work ended each time, the last first."""
    env = {"XDG_STATE_HOME": str(host.folder / "state")}
    found = cli.run("history", "--json", env=env).check().objects
    newest = sorted(found, key=lambda each: each["started"], reverse=True)
    return [each["exit_code"] for each in newest if each["work"] == work]
