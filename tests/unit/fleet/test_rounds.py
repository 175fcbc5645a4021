# SPDX-License-Identifier: Apache-2.0
"""From what is due to what was done, with commands that end as a test says, and clocks that it moves."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qmpbackup.errors import Interrupted
from qmpbackup.fleet import at_rest
from qmpbackup.fleet.history import History
from qmpbackup.fleet.records import Holding, Work, mark_of
from qmpbackup.fleet.run import presence
from qmpbackup.fleet.run.once import Outcome
from qmpbackup.fleet.run.rounds import Begun, Done, Round
from qmpbackup.fleet.run.workers import Order, Workers
from qmpbackup.fleet.settings import (
    Configuration,
    Keep,
    Retry,
    RunSettings,
    TargetSettings,
    VmSettings,
    WhenGone,
    WhenOff,
)
from qmpbackup.plan.progress import Progress
from qmpbackup.process import Result

FIVE = datetime(2026, 11, 25, 5, 0, tzinfo=UTC)
POINT = json.dumps({"point": {"id": "P1", "level": "inc", "disks": []}}).encode()
NIGHTLY = ("02:30 UTC",)
HOURLY = ("*:00 UTC",)


class Clocks:
    """One that tells the time, and one that nobody sets."""

    def __init__(self) -> None:
        self.now, self.ticks = FIVE, 0.0

    def pass_by(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.ticks += seconds


class Scripted(Workers[Begun]):
    """Commands that end one after the other, each with what `ends` says of its VM, and after how long."""

    def __init__(self, clocks: Clocks, ends: Callable[[str], tuple[int, float]]) -> None:
        super().__init__()
        self._clocks, self._ends = clocks, ends
        self.orders: list[tuple[Order[Begun], float]] = []
        self.begun: list[tuple[str, Work]] = []
        self.at_the_end = Result("q", 143, b"", "")
        self.waited: list[float] = []
        self.output = b""

    @property
    def running(self) -> list[Begun]:
        return [order.of for order, _ in self.orders]

    def look(self) -> list[tuple[Begun, Progress | None]]:
        return []

    def limit(self, limit_of: Callable[[Begun], int]) -> None:
        del limit_of

    def start(self, order: Order[Begun]) -> None:
        duty = order.of.duty
        self.begun.append((duty.vm_name, duty.work))
        self.orders.append((order, self._clocks.ticks + self._ends(duty.vm_name)[1]))

    def ended(self, seconds: float) -> tuple[Begun, Result] | None:
        for order, when in self.orders:
            if when <= self._clocks.ticks:
                self.orders.remove((order, when))
                code = self._ends(order.of.duty.vm_name)[0]
                said = f"error: code {code}" if code else ""
                return order.of, Result("q", code, self.output, said)
        self.waited.append(seconds)
        self._clocks.pass_by(30)
        return None

    def end(self) -> list[tuple[Begun, Result]]:
        return [(order.of, self.at_the_end) for order, _ in self.orders]


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.opened(tmp_path / "state") as opened:
        yield opened


@pytest.fixture
def target(tmp_path: Path) -> TargetSettings:
    return TargetSettings("main", f"{tmp_path}/backup/{{vm}}", min_free=0.0)


def vm(name: str = "a", schedule: tuple[str, ...] = NIGHTLY, **of: object) -> VmSettings:
    return VmSettings(name, "/x", targets=("main",), schedule=schedule, **of)  # type: ignore[arg-type]


class Made:
    """A round, its workers and what it told."""

    def __init__(
        self,
        clocks: Clocks,
        history: History,
        vms: tuple[VmSettings, ...],
        target: TargetSettings,
        ends: Callable[[str], tuple[int, float]] = lambda _: (0, 0.0),
        run: RunSettings | None = None,
        **of: object,
    ) -> None:
        configuration = Configuration(run=run or RunSettings(), vms=vms, targets=(target,))
        self.clocks = clocks
        self.workers = Scripted(clocks, ends)
        self.told: list[object] = []
        self.round = Round(
            configuration,
            history,
            "run",
            self.told.append,
            now=lambda: clocks.now,
            clock=lambda: clocks.ticks,
            workers=self.workers,
            **of,  # type: ignore[arg-type]
        )

    def perform(self) -> Outcome:
        return Outcome(tuple(self.round.perform()))

    def set_back(self, time: timedelta, after: int) -> None:
        """Have the clock set back once the workers were waited for so many times."""
        ended = self.workers.ended

        def setting(seconds: float) -> tuple[Begun, Result] | None:
            if len(self.workers.waited) == after:
                self.clocks.now -= time
            return ended(seconds)

        self.workers.ended = setting  # type: ignore[method-assign]

    def begun(self, name: str) -> int:
        return self.workers.begun.count((name, Work.BACKUP))


def test_a_failure_whose_second_try_falls_outside_of_the_window_is_a_failure(
    clocks: Clocks, history: History, target: TargetSettings
) -> None:
    until = f"20:00-{(FIVE + timedelta(minutes=5)).astimezone():%H:%M}"
    made = Made(clocks, history, (vm(),), target, lambda _: (6, 0.0), RunSettings(window=until))
    outcome = made.perform()
    assert made.begun("a") == 1
    assert [each.attempt.exit_code for each in outcome.final] == [6]
    assert outcome.exit_code == 14


def test_what_went_well_at_the_second_try_went_well(
    clocks: Clocks, history: History, target: TargetSettings
) -> None:
    codes = iter([6, 0])
    made = Made(clocks, history, (vm(),), target, lambda _: (0, 0.0))
    ended = made.workers.ended

    def first_fails(seconds: float) -> tuple[Begun, Result] | None:
        found = ended(seconds)
        return found and (found[0], replace(found[1], code=next(codes)))

    made.workers.ended = first_fails  # type: ignore[method-assign]
    outcome = made.perform()
    assert len(outcome.done) == 2
    assert outcome.exit_code == 0


def test_a_clock_that_is_set_back_holds_up_no_second_try(
    clocks: Clocks, history: History, target: TargetSettings
) -> None:
    made = Made(clocks, history, (vm(),), target, lambda _: (6, 0.0))
    made.set_back(timedelta(days=1), after=3)
    made.perform()
    assert made.begun("a") == 3
    assert clocks.ticks < 3600


@pytest.mark.parametrize("code", [0, 3, 5, 6, 7])
def test_what_is_due_again_in_a_long_run_is_begun_again_however_it_ended(
    clocks: Clocks, history: History, target: TargetSettings, code: int
) -> None:
    vms = (vm("big"), vm("hourly", HOURLY, retry=Retry(times=0)))
    ends = {"big": (0, 10 * 3600.0), "hourly": (code, 60.0)}
    made = Made(clocks, history, vms, target, ends.__getitem__, RunSettings(parallel=2))
    made.perform()
    assert made.begun("big") == 1
    assert made.begun("hourly") == 11


def test_nothing_is_begun_twice_for_one_time_though_the_clock_is_set_back(
    clocks: Clocks, history: History, target: TargetSettings
) -> None:
    vms = (vm("big"), vm("small"))
    ends = {"big": (0, 3600.0), "small": (0, 60.0)}
    made = Made(clocks, history, vms, target, ends.__getitem__, RunSettings(parallel=2))
    made.set_back(timedelta(hours=2), after=20)
    made.perform()
    assert made.begun("small") == made.begun("big") == 1


@pytest.mark.parametrize(
    ("ended", "noted"), [(0, 0), (8, 8), (143, 130), (-15, 130), (130, 130), (-9, -9)]
)
def test_what_ended_as_a_signal_came_ended_as_it_ended(
    clocks: Clocks, history: History, target: TargetSettings, ended: int, noted: int
) -> None:
    made = Made(clocks, history, (vm(),), target, lambda _: (0, 1e6))
    made.workers.at_the_end = Result("q", ended, POINT if not ended else b"", "")

    def interrupted(seconds: float) -> tuple[Begun, Result] | None:
        raise Interrupted(signal.SIGINT if seconds else signal.SIGTERM)

    made.workers.ended = interrupted  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        made.perform()
    last = history.last("a", "main", Work.BACKUP)
    assert last
    assert last.exit_code == noted
    assert last.ended == clocks.now
    assert bool(last.point) == (ended == 0)


def test_a_second_try_waits_for_no_target_that_was_given_up(
    clocks: Clocks, history: History, target: TargetSettings
) -> None:
    names = ("a", "b", "c")
    made = Made(clocks, history, tuple(map(vm, names)), target, lambda _: (7, 0.0))
    outcome = made.perform()
    assert outcome.exit_code == 14
    assert len(outcome.final) == 3
    assert clocks.ticks < 300, "though it would be tried again after ten minutes"


@pytest.mark.parametrize(("place", "begun"), [("{}/{{vm}}", 1), ("restic:{}/repository", 0)])
def test_folders_that_two_vms_lack_are_no_fault_of_the_others(
    clocks: Clocks, history: History, tmp_path: Path, place: str, begun: int
) -> None:
    """As where somebody has emptied them; a repository that is not there is not there for all."""
    target = TargetSettings("main", place.format(tmp_path), min_free=0.0)
    vms = tuple(map(vm, ("a", "b", "c")))
    made = Made(clocks, history, vms, target, lambda name: (0 if name == "c" else 10, 0.0))
    assert made.perform().exit_code == 14
    assert made.begun("c") == begun


def test_who_names_a_vm_does_not_wait_for_a_second_try(
    clocks: Clocks, history: History, target: TargetSettings
) -> None:
    made = Made(clocks, history, (vm(),), target, lambda _: (6, 0.0), asked=frozenset({"a"}))
    assert made.perform().exit_code == 14
    assert made.begun("a") == 1
    assert clocks.ticks < 300


def test_a_fault_of_ours_is_one_vms_failure(
    clocks: Clocks, history: History, target: TargetSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes up: as it is judged, begun, shown, or ended."""
    made = Made(clocks, history, tuple(map(vm, ("a", "b", "c", "d"))), target)
    last, start, learn = history.last, made.workers.start, made.round.orders.learn

    def strange_last(name: str, *of: object, **more: object) -> object:
        return 1 / 0 if name == "a" else last(name, *of, **more)  # type: ignore[arg-type]

    def strange_start(order: Order[Begun]) -> None:
        if order.of.duty.vm_name == "b":
            raise ValueError("embedded null byte")
        start(order)

    def strange_learn(duty: object, output: bytes) -> None:
        if getattr(duty, "vm_name", "") == "c":
            raise TypeError("an answer that is none")
        learn(duty, output)  # type: ignore[arg-type]

    def strange_report(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(history, "last", strange_last)
    monkeypatch.setattr(made.workers, "start", strange_start)
    monkeypatch.setattr(type(made.round.orders), "learn", lambda _, *of: strange_learn(*of))
    made.round.report = strange_report
    made.round.alive = strange_report
    outcome = made.perform()
    ends = {each.duty.vm_name: each for each in outcome.final}
    assert outcome.exit_code == 14
    assert ends["d"].fine
    for name, said in (("a", "division by zero"), ("b", "null byte"), ("c", "is none")):
        assert not ends[name].fine
        assert said in ends[name].attempt.reason


@pytest.mark.parametrize("output", [b'{"point": {"disks": 7}}', b"\xff{", b'{"point": {"id": []}}'])
def test_an_answer_that_nobody_understands_ends_no_run(
    clocks: Clocks, history: History, target: TargetSettings, output: bytes
) -> None:
    made = Made(clocks, history, tuple(map(vm, ("a", "b"))), target)
    ended = made.workers.ended

    def strange(seconds: float) -> tuple[Begun, Result] | None:
        found = ended(seconds)
        return found and (found[0], replace(found[1], output=output))

    made.workers.ended = strange  # type: ignore[method-assign]
    made.perform()
    assert made.begun("a") == made.begun("b") == 1


class TestTargetsThatAreGone:
    """A place where points were seen, and that is empty now."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        made = tmp_path / "backup" / "a"
        made.mkdir(parents=True)
        return made

    @staticmethod
    def held(place: Path, points: int = 3) -> dict[tuple[str, str], Holding]:
        holding = Holding("a", "main", FIVE, points=points, place=mark_of(str(place)))
        return {("a", "main"): holding}

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_folder_that_held_points_is_not_begun_anew(
        self, clocks: Clocks, history: History, target: TargetSettings, place: Path, exists: bool
    ) -> None:
        if not exists:
            place.rmdir()
        made = Made(clocks, history, (vm(retry=Retry(0)),), target, holdings=self.held(place))
        outcome = made.perform()
        assert made.begun("a") == 0
        assert outcome.exit_code == 14
        assert "perhaps it is not mounted" in outcome.final[0].attempt.reason
        last = history.last("a", "main", Work.BACKUP)
        assert last
        assert last.exit_code == 10

    @pytest.mark.parametrize("why", ["nothing was seen", "another place", "no points"])
    def test_a_first_backup_is_made(
        self, clocks: Clocks, history: History, target: TargetSettings, place: Path, why: str
    ) -> None:
        holdings = {
            "nothing was seen": {},
            "another place": self.held(place.parent),
            "no points": self.held(place, 0),
        }[why]
        made = Made(clocks, history, (vm(),), target, holdings=holdings)
        assert made.perform().exit_code == 0
        assert made.begun("a") == 1

    def test_one_that_need_not_be_there_is_passed_over(
        self, clocks: Clocks, history: History, target: TargetSettings, place: Path
    ) -> None:
        target = replace(target, when_gone=WhenGone.SKIP)
        made = Made(clocks, history, (vm(),), target, holdings=self.held(place))
        outcome = made.perform()
        assert outcome.exit_code == 0
        assert made.begun("a") == 0
        assert history.last("a", "main", Work.BACKUP) is None, "it is due until it is there"

    @pytest.mark.parametrize("code", [7, 10, 12, 1])
    def test_one_that_is_there_and_fails_has_failed(
        self, clocks: Clocks, history: History, target: TargetSettings, code: int
    ) -> None:
        target = replace(target, when_gone=WhenGone.SKIP)
        made = Made(clocks, history, (vm(retry=Retry(0)),), target, lambda _: (code, 0.0))
        assert made.perform().exit_code == 14
        last = history.last("a", "main", Work.BACKUP)
        assert last
        assert last.exit_code == code

    def test_too_little_room_is_a_failure_of_one_that_need_not_be_there(
        self, clocks: Clocks, history: History, target: TargetSettings, place: Path
    ) -> None:
        del place
        target = replace(target, when_gone=WhenGone.SKIP, min_free=2.0)
        made = Made(clocks, history, (vm(retry=Retry(0)),), target)
        outcome = made.perform()
        assert outcome.exit_code == 14
        assert "min_free" in outcome.final[0].attempt.reason

    @pytest.mark.parametrize("when_gone", list(WhenGone))
    def test_storage_that_hangs_is_asked_for_a_while_only(
        self,
        clocks: Clocks,
        history: History,
        target: TargetSettings,
        monkeypatch: pytest.MonkeyPatch,
        when_gone: WhenGone,
    ) -> None:
        ends = threading.Event()
        look, patient = presence.look, []

        def hangs(*_: object) -> presence.Presence:
            patient.append(1)
            ends.wait()
            return presence.Presence()

        monkeypatch.setattr(presence, "_look", hangs)
        monkeypatch.setattr(presence, "look", lambda place, told: look(place, told, 0.2))
        target = replace(target, when_gone=when_gone)
        made = Made(clocks, history, tuple(map(vm, ("a", "b", "c"))), target)
        try:
            outcome = made.perform()
        finally:
            ends.set()
        assert outcome.exit_code == (14 if when_gone is WhenGone.FAIL else 0)
        assert len(patient) == (2 if when_gone is WhenGone.FAIL else 1)
        assert "not answered" in outcome.final[0].attempt.reason

    def test_a_signal_ends_the_wait_for_storage_that_hangs(
        self,
        clocks: Clocks,
        history: History,
        target: TargetSettings,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        ends = threading.Event()

        def hangs(*_: object) -> presence.Presence:
            ends.wait()
            return presence.Presence()

        def interrupted() -> None:
            if made.told:
                raise Interrupted(signal.SIGTERM)

        monkeypatch.setattr(presence, "_look", hangs)
        monkeypatch.setattr("qmpbackup.interrupt.check", interrupted)
        made = Made(clocks, history, (vm(),), target)
        try:
            with pytest.raises(Interrupted):
                made.perform()
        finally:
            ends.set()


def test_a_new_point_is_what_a_folder_held(
    clocks: Clocks, history: History, target: TargetSettings
) -> None:
    """Points that were made since the last look count as well: here its folder is gone an hour later."""
    vms = (vm("big"), vm("hourly", HOURLY, retry=Retry(times=0)))
    ends = {"big": (0, 3600.0), "hourly": (0, 60.0)}
    made = Made(clocks, history, vms, target, ends.__getitem__, RunSettings(parallel=2))
    made.workers.output = POINT
    outcome = made.perform()
    codes = [each.attempt.exit_code for each in outcome.done if each.duty.vm_name == "hourly"]
    assert codes == [0, 10], "the scripted command says that it made a point, and left none"


def test_what_is_kept_is_told_by_each_new_point(
    clocks: Clocks, history: History, target: TargetSettings
) -> None:
    made = Made(clocks, history, (vm(),), replace(target, keep=Keep(last=1)))
    made.perform()
    assert made.workers.begun == [("a", Work.BACKUP), ("a", Work.FORGET)]
    assert isinstance(made.told[-1], Done)


class TestImagesAtRest:
    """Of a VM that is off at each time of its schedule, and that no run sees run."""

    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        made = tmp_path / "a.qcow2"
        made.write_bytes(b"image")
        os.utime(made, (1000, 1000))
        return made

    @staticmethod
    def night(
        clocks: Clocks,
        history: History,
        target: TargetSettings,
        image: Path,
        *,
        touched: bool = False,
    ) -> list[str]:
        """Kinds of the backups of one night. The command that backs it up writes to the image, as well."""
        holding = Holding("a", "main", clocks.now, points=3, place="moved since")
        of = vm(when_off=WhenOff.OFFLINE)
        made = Made(clocks, history, (of,), target, holdings={("a", "main"): holding}, all_vms=True)
        ended, kinds = made.workers.ended, []

        def off(seconds: float) -> tuple[Begun, Result] | None:
            found = ended(seconds)
            if found is None:
                return None
            kinds.append(found[0].attempt.consistency)
            if not kinds[-1]:
                return found[0], replace(found[1], code=13)
            if touched:
                os.utime(image, (clocks.now.timestamp(), clocks.now.timestamp()))
            point = {"level": "inc", "disks": [{"source_file": str(image)}]}
            return found[0], replace(found[1], output=json.dumps({"point": point}).encode())

        made.workers.ended = off  # type: ignore[method-assign]
        made.perform()
        clocks.pass_by(86400)
        return kinds

    @pytest.mark.parametrize("touched", [False, True])
    def test_they_are_backed_up_once_and_again_when_somebody_wrote_to_them(
        self, clocks: Clocks, history: History, target: TargetSettings, image: Path, touched: bool
    ) -> None:
        def night() -> list[str]:
            return self.night(clocks, history, target, image, touched=touched)

        assert night() == ["", "offline"]
        history.forget_before(clocks.now - timedelta(days=400))
        assert night() == night() == [""]
        os.utime(image, (2000, 2000))
        assert at_rest.point(history, "a", "main") is None, "status is not well for ever"
        assert night() == ["", "offline"]
        assert night() == [""]
        assert at_rest.point(history, "a", "main") is not None

    def test_where_nobody_can_tell_they_are_not_what_they_were(
        self, clocks: Clocks, history: History, target: TargetSettings, image: Path
    ) -> None:
        self.night(clocks, history, target, image)
        image.unlink()
        assert at_rest.point(history, "a", "main") is None
        assert self.night(clocks, history, target, image) == ["", "offline"]

    def test_a_backup_into_another_target_hides_no_change(
        self, clocks: Clocks, history: History, target: TargetSettings, image: Path
    ) -> None:
        self.night(clocks, history, target, image)
        os.utime(image, (2000, 2000))
        at_rest.look(history, "a", clocks.now)
        at_rest.backed_up(history, "a", (str(image),))
        assert self.night(clocks, history, target, image) == ["", "offline"]
        assert self.night(clocks, history, target, image) == [""]
