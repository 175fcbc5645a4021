# SPDX-License-Identifier: Apache-2.0
"""All VMs of a configuration in one run: real VMs, one that is off, a dead target, a typo."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab import cli, sinks
from lab.disks import MIB, Disk, create
from lab.patience import wait_until
from lab.qemu import Qemu
from lab.repositories import Repository

DEGRADED, SOME_FAILED = 3, 14

CALM = 'limits = { pause = "1h" }'
"""However busy the machine is, no point is degraded as its VM stood still for long."""


@dataclass
class Host:
    """A host with VMs, and a configuration that is put together from tables."""

    folder: Path
    vms: dict[str, Qemu]
    tables: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables |= {"defaults": CALM}
        self.tables |= {
            f"vm.{name}": f'socket = "{vm.socket}"' for name, vm in self.vms.items()
        } | {"target.main": f'location = "{self.folder}/backup/{{vm}}"\nverify = {{ every = "" }}'}

    @property
    def environment(self) -> Mapping[str, str]:
        return {"XDG_STATE_HOME": str(self.folder / "state"), **self.variables}

    def arguments(self, *more: cli.Argument) -> tuple[cli.Argument, ...]:
        """`run` with the tables as they are now."""
        path = self.folder / "config.toml"
        path.write_text("\n".join(f"[{name}]\n{text}" for name, text in self.tables.items()))
        return ("run", "--config", path, *more)

    def run(self, *more: cli.Argument) -> cli.Result:
        return cli.run(*self.arguments(*more), env=self.environment)

    def points(self, vm: str) -> list[str]:
        """Levels of the points of a VM in its folder."""
        target = self.folder / "backup" / vm
        if not target.exists():
            return []
        listed = cli.run("list", "--target", target, "--json").check()
        return [each["level"] for each in listed.objects]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        vms = {
            name: stack.enter_context(
                Qemu([Disk("vda", create(tmp_path / name, 4 * MIB))], name=name)
            )
            for name in ("db1", "web1")
        }
        yield Host(tmp_path, vms)


def ended(result: cli.Result) -> dict[tuple[str, str, str], int]:
    """How each piece of work ended at last."""
    return {
        (each["vm"], each["target"], each["work"]): each["exit_code"] for each in result.objects
    }


def test_what_is_due_is_backed_up_once_and_pruned(host: Host) -> None:
    host.tables["target.main"] += "\nkeep = { last = 1 }"
    first = host.run("--json").check()
    assert ended(first) == {
        (vm, "main", work): 0 for vm in ("db1", "web1") for work in ("backup", "forget")
    }
    assert "Nothing is due" in host.run().check().out
    host.vms["db1"].write("vda", 0, MIB, 0x11)
    host.run("db1").check()
    host.run("--all").check()
    assert host.points("db1") == ["full"], "what is not kept was merged away"
    assert host.points("web1") == ["full"]


def test_one_that_is_off_one_typo_and_a_dead_target_harm_no_other(host: Host) -> None:
    host.tables |= {
        "vm.off": f'socket = "{host.folder}/none"',
        "vm.typo": f'socket = "{host.folder}/none2"\nscedule = "02:30"',
        "target.dead": 'location = "/proc/nowhere/{vm}"',
        "defaults": f"{CALM}\nretry = {{ times = 0 }}",
    }
    result = host.run("--json").check(SOME_FAILED)
    found = ended(result)
    for vm in ("db1", "web1"):
        assert found[vm, "main", "backup"] == 0
        assert found[vm, "dead", "backup"] == 7
        assert host.points(vm) == ["full"]
    assert found["off", "main", "backup"] == 13
    assert not any(vm == "typo" for vm, _, _ in found)
    assert 'did you mean "schedule"?' in result.err


def test_a_target_that_two_cannot_use_costs_the_third_nothing(host: Host) -> None:
    extra = host.vms["db1"].socket
    host.tables |= {f"vm.more{number}": f'socket = "{extra}"' for number in range(3)}
    host.tables["target.main"] = 'location = "/proc/nowhere/{vm}"'
    host.tables["defaults"] += "\nretry = { times = 0 }"
    result = host.run("--json").check(SOME_FAILED)
    given_up = [each for each in result.objects if "was given up for this run" in each["reason"]]
    assert len(result.objects) == 5
    assert len(given_up) == 3
    assert all(each["exit_code"] == 7 for each in result.objects)


def test_without_a_history_points_in_the_target_say_what_is_due(host: Host) -> None:
    host.run().check()
    for path in (host.folder / "state" / "qmpbackup").glob("history*"):
        path.unlink()
    assert "Nothing is due" in host.run().check().out
    for name in ("db1", "web1"):
        assert host.points(name) == ["full"]


def test_a_vm_that_went_off_is_backed_up_once_as_it_lies(host: Host) -> None:
    host.tables["defaults"] += '\nwhen_off = "offline"'
    host.run().check()
    host.vms["web1"].quit()
    host.run("--all").check()
    assert len(host.points("web1")) == 2
    host.run("--all").check()
    assert len(host.points("web1")) == 2
    assert len(host.points("db1")) == 3


def test_one_that_must_run_and_is_off_is_a_failure(host: Host) -> None:
    host.tables["vm.web1"] += '\nwhen_off = "fail"'
    host.vms["web1"].quit()
    assert ended(host.run("--json").check(SOME_FAILED))["web1", "main", "backup"] == 13


def test_a_configuration_that_cannot_be_used_starts_nothing(host: Host) -> None:
    host.tables["run"] = 'parallel = "many"'
    result = host.run().check(2)
    assert "run.parallel" in result.err
    assert host.points("db1") == []
    assert "no VM" in Host(host.folder, host.vms).run("db3").check(2).err


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_ends_takes_its_children_with_it_and_is_made_up(
    host: Host, how: signal.Signals
) -> None:
    host.tables["defaults"] = "limits = { speed = 1 }"  # it would take for ever
    for vm in host.vms.values():
        vm.write("vda", 0, 4 * MIB, 0x22)
    with cli.start(*host.arguments(), env=host.environment) as running:
        wait_until(running.unless_over(lambda: backup_of(running.pid) is not None))
        child = backup_of(running.pid)
        running.signal(how)
        result = running.wait()
    assert result.code == (143 if how is signal.SIGTERM else -how)
    wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert host.points("db1") == host.points("web1") == []
    host.tables["defaults"] = CALM
    again = host.run("--all", "--json").check()
    assert ended(again) == {(vm, "main", "backup"): 0 for vm in ("db1", "web1")}


def backup_of(pid: int, word: str = "") -> int | None:
    """The child that is making a backup, of the VM that a word of its command names."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        words = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"\0backup\0" in words and os.fsencode(word) in words:
            return int(child)
    return None


def test_what_runs_into_a_target_now_shares_its_bandwidth(host: Host) -> None:
    host.tables["run"] = "parallel = 2"
    host.tables["target.main"] += "\nbandwidth = [{ limit = 7 }]"
    db1, web1 = host.vms["db1"], host.vms["web1"]
    for vm in (db1, web1):
        vm.write("vda", 0, 4 * MIB, 0x44)

    def speed(vm: Qemu) -> list[int]:
        return [each["speed"] for each in vm.qmp("query-block-jobs")]

    with cli.start(*host.arguments(), env=host.environment) as running:
        wait_until(running.unless_over(lambda: (speed(db1), speed(web1)) == ([3], [3])))
        child = backup_of(running.pid, str(db1.socket))
        assert child is not None
        os.kill(child, signal.SIGTERM)
        wait_until(running.unless_over(lambda: speed(web1) == [7]))
        running.signal(signal.SIGTERM)
        running.wait().check(143)


def test_a_second_run_by_the_schedules_leaves_at_once(host: Host) -> None:
    host.tables["defaults"] = "limits = { speed = 1 }"
    host.vms["db1"].write("vda", 0, 4 * MIB, 0x33)
    with cli.start(*host.arguments(), env=host.environment) as running:
        wait_until(running.unless_over(lambda: backup_of(running.pid)))
        second = host.run().check()
        assert "Another run" in second.err
        running.signal(signal.SIGTERM)
        running.wait().check(143)


def test_a_repository_is_forgotten_in_and_swept_and_its_password_is_nowhere(host: Host) -> None:
    marker = "marker-of-a-secret"
    secret = host.folder / "password"
    secret.write_text(marker)
    secret.chmod(0o600)
    made = Repository(str(host.folder / "repository"), host.folder, marker)
    cli.run("init", "--target", str(made), env=made.environment).check()
    host.tables["target.main"] = f"""location = "{made}"
password = {{ file = "{secret}" }}
keep = {{ last = 1 }}
verify = {{ every = "" }}"""
    first = host.run("--json").check()
    assert [each["work"] for each in first.objects].count("backup") == 2
    assert ended(first)["", "main", "sweep"] == 0, "after all backups"
    second = host.run("--all", "--json").check()
    assert {each["exit_code"] for each in second.objects} == {0}
    third = host.run("--json").check()
    assert ended(third) == {}
    assert len(made.snapshots()) == 2
    for path in (host.folder / "state").rglob("*"):
        assert not path.is_file() or marker.encode() not in path.read_bytes()
    for result in (first, second, third):
        assert marker not in result.out + result.err
    assert os.environ.get("RESTIC_PASSWORD") is None


def test_whoever_is_to_know_is_told_once_and_once_when_it_is_well(host: Host) -> None:
    with sinks.web_server() as web:
        host.tables |= {
            "notify.ops": f'type = "webhook"\nurl = "{web.url}"',
            "metrics": f'textfile = "{host.folder}/none/qmpbackup.prom"',
            "defaults": f"{CALM}\nretry = {{ times = 0 }}",
            "vm.web1": f'socket = "{host.vms["web1"].socket}"\ninclude = ["nothing"]',
        }
        host.run().check(SOME_FAILED)
        host.run().check(DEGRADED)  # as nobody can measure it
        assert len(web.asked) == 1, "what was told is not told again"
        assert b"nothing" in web.asked[0].body
        assert b"metrics" in web.asked[0].body
        del host.tables["metrics"]
        host.tables["vm.web1"] = f'socket = "{host.vms["web1"].socket}"'
        host.run("--all").check()
        assert len(web.asked) == 2
        assert b"well again" in web.asked[1].body
        host.run("--all").check()
        assert len(web.asked) == 2


def test_a_path_that_cannot_be_looked_at_is_one_vms_failure(host: Host) -> None:
    """Here it is too long; a folder that we may not enter is another such."""
    with sinks.web_server() as web:
        host.tables |= {
            "vm.odd": f'socket = "/{"x" * 300}/odd.qmp"',
            "notify.ops": f'type = "webhook"\nurl = "{web.url}"',
            "defaults": f"{CALM}\nretry = {{ times = 0 }}",
        }
        found = ended(host.run("--json").check(SOME_FAILED))
        assert found["db1", "main", "backup"] == found["web1", "main", "backup"] == 0
        assert found["odd", "main", "backup"] != 0
        assert [b"odd" in each.body for each in web.asked] == [True]


def test_a_run_that_is_ended_tells_so_once(host: Host) -> None:
    """By itself, so that the unit that systemd starts then has nothing to tell; and once when it is well."""
    with sinks.web_server() as web:
        host.tables["notify.ops"] = f'type = "webhook"\nurl = "{web.url}"'
        host.tables["notify.hc"] = f'type = "healthchecks"\nurl = "{web.url}/ping"'
        host.tables["defaults"] = "limits = { speed = 1 }"  # it would take for ever
        for vm in host.vms.values():
            vm.write("vda", 0, 4 * MIB, 0x22)
        with cli.start(*host.arguments(), env=host.environment) as running:
            wait_until(running.unless_over(lambda: backup_of(running.pid) is not None))
            running.signal(signal.SIGTERM)
            running.wait().check(143)
        messages = [each for each in web.asked if "ping" not in each.path]
        assert [b"broke off" in each.body for each in messages] == [True]
        assert "/ping/143" in web.paths
        host.tables["defaults"] = CALM
        host.run("--all").check()
        messages = [each for each in web.asked if "ping" not in each.path]
        assert [b"well again" in each.body for each in messages] == [False, True]


def test_a_configuration_that_is_spoilt_during_a_run_spoils_the_next_one_only(host: Host) -> None:
    with cli.start(*host.arguments(), env=host.environment) as running:
        wait_until(running.unless_over(lambda: backup_of(running.pid) is not None))
        (host.folder / "config.toml").write_text("[run\n\0garbage")
        running.wait().check()
    host_of_garbage = cli.run("run", "--config", host.folder / "config.toml", env=host.environment)
    assert host_of_garbage.code == 2
    assert host.points("db1") == host.points("web1") == ["full"]
    assert "Nothing is due" in host.run().check().out


def test_a_vm_that_hangs_is_its_own_failure_and_named(host: Host) -> None:
    pid = host.vms["db1"].pid
    host.tables["defaults"] += "\nretry = { times = 0 }"
    os.kill(pid, signal.SIGSTOP)
    try:
        result = host.run("--json").check(SOME_FAILED)
    finally:
        os.kill(pid, signal.SIGCONT)
    found = ended(result)
    assert found["db1", "main", "backup"] == 6
    assert found["web1", "main", "backup"] == 0
    (said,) = [each["reason"] for each in result.objects if each["vm"] == "db1"]
    assert str(pid) in said, said
