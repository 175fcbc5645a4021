# SPDX-License-Identifier: Apache-2.0
"""What targets hold is looked at in them: whose points are whose, and what becomes of those that hang."""

import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lab.patience import PATIENCE
from qmpbackup import interrupt
from qmpbackup.errors import Interrupted, StorageError, UsageError
from qmpbackup.fleet import looking
from qmpbackup.fleet.history import History
from qmpbackup.fleet.looking import Clues, look, whose
from qmpbackup.fleet.records import Attempt, Holding, Work, mark_of
from qmpbackup.fleet.settings import Configuration, TargetSettings, VmSettings, WhenGone
from qmpbackup.fleet.survey import is_off
from qmpbackup.model import Consistency, Level, Point, VmConfig, VmIdentity
from qmpbackup.targets.overview import HeldVm, Overview

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
VM = VmSettings("db1", "/run/qemu/db1.qmp", targets=("main",))
HOST = socket.gethostname()
KNOWN = Holding("db1", "main", NOW)
TARGET = TargetSettings("main", "/nowhere/{vm}")


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.opened(tmp_path) as opened:
        yield opened


def held(name: str, host: str = HOST, uuid: str = "", address: str = "", hours: int = 0) -> HeldVm:
    identity = VmIdentity(uuid, name, address, host)
    time = NOW - timedelta(hours=hours)
    config = VmConfig(identity, "7.2")
    point = Point(f"p-{name}-{hours}", 1, time, Level.FULL, None, Consistency.CRASH, config, ())
    return HeldVm(identity, 1, point)


@pytest.mark.parametrize(
    ("vms", "clues", "expected"),
    [
        ((held("db1"), held("web")), Clues(HOST, KNOWN, None), 0),
        ((held("db1", host="kvm9"), held("web")), Clues(HOST, KNOWN, None), None),
        ((held("qemu-17", address=VM.socket), held("db1")), Clues(HOST, KNOWN, None), 0),
        ((held("a", address=VM.socket, host="kvm9"), held("db1")), Clues(HOST, KNOWN, None), 1),
        (
            (held("db1"), held("moved", "kvm9", "U-1")),
            Clues(HOST, replace(KNOWN, uuid="u-1"), None),
            1,
        ),
        (
            (held("db1", hours=9), held("anew", hours=1)),
            Clues(HOST, KNOWN, Attempt(Work.BACKUP, "db1", "main", "r", NOW, point="p-anew-1")),
            1,
        ),
        (
            (held("a", address=VM.socket, hours=99), held("b", address=VM.socket, hours=1)),
            Clues(HOST, KNOWN, None),
            1,
        ),
    ],
)
def test_points_are_known_by_what_they_were_made_of(
    vms: tuple[HeldVm, ...], clues: Clues, expected: int | None
) -> None:
    assert whose(VM, vms, clues) is (None if expected is None else vms[expected])


RENAMED = held("db1", uuid="U-1", address="/run/qemu/old-db1.qmp")


@pytest.mark.parametrize("known", [KNOWN, replace(KNOWN, uuid="u-1")])
def test_points_of_one_that_was_renamed_are_not_those_of_a_new_one_at_its_socket(
    known: Holding,
) -> None:
    elsewhere = frozenset({RENAMED.identity.address})
    assert whose(VM, (RENAMED,), Clues(HOST, known, None, elsewhere)) is None
    assert whose(VM, (RENAMED,), Clues(HOST, known, None)) is RENAMED


def test_two_vms_with_one_uuid_are_told_so(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clones of one: a repository takes their points for those of one VM, and neither may be well by
    the other's."""
    of_both = Overview((held("db2", uuid="U-1", address="/run/qemu/db2.qmp"),))
    monkeypatch.setattr(looking, "_look_at", lambda *_: of_both)
    place = "restic:/repository"
    other = replace(VM, name="db2", socket="/run/qemu/db2.qmp")
    target = replace(TARGET, location=place)
    history.note(Holding("db1", "main", NOW, NOW, "p", points=1, uuid="u-1", place=mark_of(place)))
    configuration = Configuration(vms=(VM, other), targets=(target,))
    first, second = look(configuration, history, NOW, nothing).holdings
    assert "same UUID" in first.problem
    assert (second.problem, second.points) == ("", 1)


def test_points_that_were_made_here_come_before_newer_ones_of_one_that_has_moved() -> None:
    moved = held("db1", "kvm9", "U-1", hours=0)
    here = held("db1", uuid="U-2", address=VM.socket, hours=30)
    found = whose(VM, (moved, here), Clues(HOST, replace(KNOWN, uuid="u-1"), None))
    assert found is here


def test_a_vm_whose_socket_cannot_be_looked_at_is_not_off(tmp_path: Path) -> None:
    """As where whoever asks may not enter the folder: it would be well for as long as one may be off."""
    there = tmp_path / "db1.qmp"
    vm = replace(VM, socket=str(there))
    assert is_off(vm, None, NOW)
    there.symlink_to(there)  # not even root can look through that
    assert not is_off(vm, None, NOW)


def nothing(_target: TargetSettings) -> Mapping[str, str]:
    return {}


def test_a_target_that_is_not_there_yet_holds_nothing(history: History) -> None:
    found = look(Configuration(vms=(VM,), targets=(TARGET,)), history, NOW, nothing)
    assert found.holdings == (Holding("db1", "main", NOW, place=mark_of("/nowhere/db1")),)
    assert history.holdings() == [*found.holdings]


@pytest.mark.parametrize("when_gone", list(WhenGone))
def test_a_target_that_is_gone_leaves_what_was_seen_last(
    history: History, when_gone: WhenGone
) -> None:
    before = Holding("db1", "main", NOW - timedelta(days=1), NOW - timedelta(days=1), "p", points=3)
    history.note(before)
    target = replace(TARGET, when_gone=when_gone)
    (found,) = look(Configuration(vms=(VM,), targets=(target,)), history, NOW, nothing).holdings
    assert replace(found, problem="", place="") == before
    assert bool(found.problem) == (when_gone is WhenGone.FAIL)


def test_another_place_says_nothing_of_what_was_seen_before(history: History) -> None:
    """As where a target was moved: its first backup there has lost nothing."""
    history.note(Holding("db1", "main", NOW, NOW, "p", points=3, place=mark_of("/before/db1")))
    found = look(Configuration(vms=(VM,), targets=(TARGET,)), history, NOW, nothing)
    assert [(each.points, each.problem) for each in found.holdings] == [(0, "")]


def test_a_secret_that_cannot_be_had_is_a_problem_of_its_target_alone(history: History) -> None:
    def fails(target: TargetSettings) -> Mapping[str, str]:
        if target.name == "main":
            raise UsageError("There is no credential offsite.")
        raise RuntimeError("a fault of ours")

    other = TargetSettings("other", "/elsewhere/{vm}")
    vm = replace(VM, targets=("main", "other"))
    found = look(Configuration(vms=(vm,), targets=(TARGET, other)), history, NOW, fails)
    assert [each.problem for each in found.holdings] == [
        "There is no credential offsite.",
        "Looking at it failed: RuntimeError: a fault of ours.",
    ]
    assert [bool(each.problem) for each in found.sights] == [True, True]


def test_storage_that_hangs_holds_up_nobody(history: History) -> None:
    ends = threading.Event()

    def hangs(target: TargetSettings) -> Mapping[str, str]:
        if target.name == "main":
            ends.wait()
        raise StorageError("It is broken.")

    other = TargetSettings("other", "/elsewhere/{vm}")
    vm = replace(VM, targets=("main", "other"))
    configuration = Configuration(vms=(vm,), targets=(TARGET, other))
    try:
        found = look(configuration, history, NOW, hangs, patience=0.5)
    finally:
        ends.set()
    assert "not answered" in found.holdings[0].problem
    assert looking.PATIENCE > 45  # a storage's own patience with one that is not there


def test_a_target_all_of_whose_places_hang_blinds_nobody_for_another(history: History) -> None:
    ends = threading.Event()

    def hangs(target: TargetSettings) -> Mapping[str, str]:
        if target.name == "main":
            ends.wait()
        return {}

    hung = tuple(VmSettings(f"a{n}", f"/x/{n}", targets=("main",)) for n in range(20))
    web = VmSettings("web", "/x/web", targets=("other",))
    other = TargetSettings("other", "/nowhere/{vm}")
    configuration = Configuration(vms=(*hung, web), targets=(TARGET, other))
    try:
        found = look(configuration, history, NOW, hangs, patience=5.0)
    finally:
        ends.set()
    assert {each.problem for each in found.holdings if each.vm == "web"} == {""}


def test_who_is_told_to_stop_does_not_wait_for_storage_that_hangs(history: History) -> None:
    ends, main = threading.Event(), threading.get_ident()

    def hangs(_target: TargetSettings) -> Mapping[str, str]:
        signal.pthread_kill(main, signal.SIGTERM)
        ends.wait()
        raise StorageError("It is broken.")

    configuration = Configuration(vms=(VM,), targets=(TARGET,))
    try:
        with interrupt.held(), pytest.raises(Interrupted):
            look(configuration, history, NOW, hangs, patience=PATIENCE)
    finally:
        ends.set()


def test_the_host_has_the_name_that_runs_call_it_by(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a target with `{host}` in its place would be looked for where no run ever writes."""
    monkeypatch.setenv("RESTIC_HOST", "another-name")
    points = tmp_path / "another-name" / "db1" / "points"
    points.mkdir(parents=True)
    (points / "20261102T040000Z-000001.json").write_text("garbage")
    target = TargetSettings("main", f"{tmp_path}/{{host}}/{{vm}}")
    (seen,) = look(Configuration(vms=(VM,), targets=(target,)), history, NOW, nothing).sights
    assert seen.damaged
