# SPDX-License-Identifier: Apache-2.0
"""One look at a repository with points of many VMs of many hosts: what is there now, whatever was cached."""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lab import cli
from lab.repositories import Repository
from lab.restic import PASSWORD, Restic
from qmpbackup.errors import DamagedError
from qmpbackup.model import Location
from qmpbackup.restic.repository import Repository as Opened
from qmpbackup.restic.storage.location import connect
from qmpbackup.targets import opening
from qmpbackup.targets.overview import HeldVm, Overview
from stock.data_centre import DataCentre

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


@pytest.fixture
def centre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataCentre:
    """Five VMs, of which one has no UUID, with three points each."""
    made = DataCentre(tmp_path, vms=5, points=3, now=NOW)
    for name, value in made.make().items():
        monkeypatch.setenv(name, value)
    return made


def look(centre: DataCentre, now: datetime = NOW) -> Overview:
    return opening.entrance(Location(centre.location)).overview(now)


def of(overview: Overview, name: str) -> HeldVm:
    (found,) = [each for each in overview.vms if each.identity.name == name]
    return found


def restic(centre: DataCentre) -> Restic:
    return Repository(centre.location, centre.folder).restic


def snapshots(centre: DataCentre, name: str) -> list[str]:
    """Names of the snapshots of a VM, oldest first."""
    return [
        each["id"] for each in restic(centre)("snapshots", "--json", "--tag", f"vm={name}").json
    ]


def test_every_vm_of_every_host_is_there_with_its_newest_point(centre: DataCentre) -> None:
    for _ in range(2):
        found = look(centre)
        assert {each.identity for each in found.vms} == {centre.identity(n) for n in range(5)}
        assert {each.points for each in found.vms} == {3}
        for number in range(5):
            newest = of(found, f"vm{number}").newest
            assert newest is not None
            assert newest.time == NOW - timedelta(minutes=number)
        assert found.damaged == ()
        assert found.folder == Path(centre.location)


def test_what_came_and_went_since_the_last_look_is_seen(centre: DataCentre) -> None:
    before = of(look(centre), "vm3")
    restic(centre)("forget", snapshots(centre, "vm3")[-1])
    after = of(look(centre), "vm3")
    assert before.newest is not None
    assert after.newest is not None
    assert (after.points, after.newest.time) == (2, before.newest.time - timedelta(days=1))


@pytest.mark.parametrize("name", ["vm2", "vm3"])
def test_points_whose_tags_somebody_has_replaced_are_points(centre: DataCentre, name: str) -> None:
    restic(centre)("tag", "--set", "keep", *snapshots(centre, name))
    assert of(look(centre), name).points == 3


def test_what_others_keep_there_is_none_of_ours(centre: DataCentre, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "page.html").write_text("precious")
    restic(centre)("backup", theirs)
    for _ in range(2):
        assert len(look(centre).vms) == 5


def test_a_damaged_snapshot_hides_no_other(centre: DataCentre) -> None:
    name = snapshots(centre, "vm3")[-1]
    path = Path(centre.location) / "snapshots" / name
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = look(centre)
    assert [each.path for each in found.damaged] == [f"snapshots/{name}"]
    assert of(found, "vm3").points == 2
    assert len(found.vms) == 5


def test_a_newest_point_whose_manifest_is_lost_is_damaged_and_the_one_before_counts(
    centre: DataCentre,
) -> None:
    with connect(centre.location, os.environ) as storage, Opened.open(storage, PASSWORD) as opened:
        newest = opened.snapshot(snapshots(centre, "vm3")[-1])
        later = replace(newest, time=NOW, tree=b"gone" * 8)
        name = opened.save_snapshot(later)
    for _ in range(2):
        seen = look(centre)
        found = of(seen, "vm3")
        assert found.newest is not None
        assert (found.points, found.damaged) == (4, 1)
        assert found.newest.time == NOW - timedelta(minutes=3)
        assert [each.path for each in seen.damaged] == [f"snapshots/{name}"]


def test_a_cache_that_is_no_good_is_as_none(centre: DataCentre) -> None:
    seen = look(centre)
    cache = centre.folder / "cache"
    for path in (each for each in cache.rglob("*") if each.is_file()):
        path.write_bytes(b"[]\n" + path.read_bytes()[:50])
    assert set(look(centre).vms) == set(seen.vms)


def test_status_of_a_target_needs_no_configuration(centre: DataCentre) -> None:
    target = ("--target", f"restic:{centre.location}")
    shown = cli.run("status", *target).check()
    assert "5 VMs of 5 hosts, 15 points" in shown.out
    lines = [line.split() for line in shown.out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["vm4", "vm3", "vm2", "vm1", "vm0"]
    first = cli.run("status", *target, "--json").check().objects[0]
    assert (first["vm"], first["host"], first["points"]) == ("vm4", "kvm4", 3)


def test_status_of_a_damaged_target_says_so_and_shows_the_rest(centre: DataCentre) -> None:
    path = Path(centre.location) / "snapshots" / snapshots(centre, "vm3")[-1]
    path.chmod(0o600)
    path.write_bytes(b"x")
    shown = cli.run("status", "--target", f"restic:{centre.location}")
    assert shown.code == DamagedError.exit_code
    assert "5 VMs of 5 hosts, 14 points" in shown.out
    assert path.name in shown.err
