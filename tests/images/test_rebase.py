# SPDX-License-Identifier: Apache-2.0
"""Merging in place, linking and exporting: the right bytes afterwards, and nothing lost in silence."""

import json
import re
import shutil
import signal
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from lab import cli
from lab.damage import flip
from lab.file_steps import held
from lab.patience import wait_until
from qmpbackup.errors import DamagedError, Locked, StorageError, UsageError
from qmpbackup.model import Level, Point
from qmpbackup.plan.merge import Operation
from qmpbackup.service.original.choosing import Request
from qmpbackup.service.original.export import export
from qmpbackup.service.original.link import link
from qmpbackup.service.original.merge import dry_run, merge
from qmpbackup.service.restore import Request as RestoreRequest
from qmpbackup.service.restore import restore
from qmpbackup.service.verify import Request as VerifyRequest
from qmpbackup.service.verify import verify
from stock.stored import MIB, Stored, Write, contents, run, tree

COMMIT, SNAPSHOTS = Operation.COMMIT, Operation.SNAPSHOTS
DISK = "hd0"
FIRST_WRITES = [Write(1, 0, 2 * MIB)]
LATER_WRITES = [
    [Write(2, 65536, 65536), Write(0, MIB, 512)],
    [Write(3, 0, 4096), Write(3, 3 * MIB, 4096)],
    [Write(4, 65536, 512), Write(0, 3 * MIB, 4096)],
]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A full and three incrementals of one disk."""
    stored = Stored(tmp_path / "target")
    stored.add(Level.FULL, {DISK: FIRST_WRITES})
    for writes in LATER_WRITES:
        stored.add(Level.INC, {DISK: writes})
    return stored


def folder(stored: Stored) -> Path:
    return stored.path / DISK


def name(stored: Stored, number: int) -> str:
    """The name of the file of a point as it was made."""
    return stored.file(stored.points[number], DISK).name


def request(stored: Stored, until: int | None = None, skip_check: bool = False) -> Request:
    last = "" if until is None else name(stored, until)
    return Request(folder(stored), until=last, skip_check=skip_check)


def assert_right(stored: Stored, points: list[Point], out: Path) -> None:
    """The target holds just these points, and each gives back every byte of its disks."""
    inventory = stored.target.load()
    assert [point.id for point in inventory.points] == [point.id for point in points]
    for point in inventory.points:
        outcome = restore(
            RestoreRequest(stored.path, point.id, folder=out / point.id, format="raw")
        )
        for each in outcome.disks:
            assert each.path.read_bytes() == stored.expected[point.id, each.disk_id], point.id
    report = verify(VerifyRequest(stored.path))
    assert report.whole, report
    assert not report.foreign


def reload(stored: Stored) -> None:
    """What a later backup finds."""
    stored.points[:] = stored.target.load().points


def assert_unchanged(before: dict[str, bytes | str], path: Path) -> None:
    after = tree(path)
    assert sorted(after) == sorted(before)
    assert [key for key in before if before[key] != after[key]] == []


# --- merging in place


def test_the_full_holds_the_newest_state_and_stands_alone(stored: Stored, tmp_path: Path) -> None:
    newest = stored.points[-1]
    full = folder(stored) / name(stored, 0)
    merge(request(stored), COMMIT)
    assert [each.name for each in folder(stored).iterdir()] == [full.name]
    assert contents(full, "qcow2") == stored.expected[newest.id, DISK]
    assert_right(stored, [newest], tmp_path / "out")
    assert stat.S_IMODE(full.stat().st_mode) == 0o600


def test_points_after_until_stay_right(stored: Stored, tmp_path: Path) -> None:
    merge(request(stored, until=2), COMMIT)
    assert_right(stored, stored.points[2:], tmp_path / "out")
    newest = folder(stored) / name(stored, 3)
    assert contents(newest, "qcow2") == stored.expected[stored.points[3].id, DISK]
    run("qemu-img", "check", str(newest))


def test_the_next_incremental_builds_on_what_was_merged(stored: Stored, tmp_path: Path) -> None:
    merge(request(stored), COMMIT)
    reload(stored)
    stored.add(Level.INC, {DISK: [Write(7, 128 * 1024, 512)]})
    assert_right(stored, stored.points, tmp_path / "out")
    merge(Request(folder(stored)), COMMIT)
    assert_right(stored, stored.points[-1:], tmp_path / "again")


def test_other_disks_of_the_points_stay(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "target")
    stored.add(Level.FULL, {DISK: FIRST_WRITES, "b": FIRST_WRITES})
    stored.add(Level.INC, {DISK: LATER_WRITES[0], "b": LATER_WRITES[1]})
    merge(request(stored), COMMIT)
    assert_right(stored, stored.points, tmp_path / "out")
    first = stored.target.load().points[0]
    assert [(each.id, each.into) for each in first.merged] == [(DISK, stored.points[1].id)]
    merge(Request(stored.path / "b"), COMMIT)
    assert_right(stored, stored.points[1:], tmp_path / "again")


def test_every_state_becomes_a_snapshot(stored: Stored, tmp_path: Path) -> None:
    outcome = merge(request(stored), SNAPSHOTS)
    assert_right(stored, stored.points, tmp_path / "out")
    full = folder(stored) / name(stored, 0)
    assert list(folder(stored).iterdir()) == [full]
    info = json.loads(run("qemu-img", "info", "--output=json", str(full)))
    names = [each["name"] for each in info["snapshots"]]
    times = [f"{point.time:%Y-%m-%d-%H:%M:%S}" for point in stored.points[1:]]
    assert names == ["FULL-BACKUP", *times]
    assert names == [tag.name for tag in outcome.plan.tags]


def test_snapshots_are_kept_by_later_merges(stored: Stored, tmp_path: Path) -> None:
    merge(request(stored, until=1), SNAPSHOTS)
    assert_right(stored, stored.points, tmp_path / "1")
    reload(stored)
    merge(request(stored, until=2), SNAPSHOTS)
    assert_right(stored, stored.points, tmp_path / "2")
    reload(stored)
    merge(request(stored), COMMIT)
    first, second, third, last = stored.points
    assert_right(stored, [first, second, last], tmp_path / "3")
    assert third.id not in {point.id for point in stored.target.load().points}


def test_a_disk_that_grew(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "target")
    stored.add(Level.FULL, {DISK: FIRST_WRITES})
    stored.size = 6 * MIB
    stored.add(Level.INC, {DISK: [Write(5, 5 * MIB, 512)]})
    copy = tmp_path / "copy"
    shutil.copytree(stored.path, copy)
    merge(request(stored), SNAPSHOTS)
    points = stored.target.load().points
    for point, size in zip(points, (4 * MIB, 6 * MIB), strict=True):
        out = tmp_path / point.id
        restore(RestoreRequest(stored.path, point.id, folder=out, format="raw"))
        assert (out / "hd0.raw").read_bytes() == stored.expected[point.id, DISK]
        assert (out / "hd0.raw").stat().st_size == size
    merge(Request(copy / DISK), COMMIT)
    full = copy / DISK / name(stored, 0)
    assert contents(full, "qcow2") == stored.expected[stored.points[1].id, DISK]


def test_a_compressed_full_stays_compressed(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "target", size=16 * MIB)
    stored.add(Level.FULL, {DISK: [Write(1, 0, 16 * MIB)]})
    plain = stored.file(stored.points[0], DISK)
    copied = tmp_path / "plain" / DISK
    copied.mkdir(parents=True)
    run("qemu-img", "convert", "-c", "-O", "qcow2", str(plain), str(copied / "FULL-1"))
    link_ = ("-u", "-b", "FULL-1", "-F", "qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", *link_, str(copied / "INC-2"), "16M")
    merge(Request(copied), COMMIT)
    assert (copied / "FULL-1").stat().st_size < 2 * MIB
    assert contents(copied / "FULL-1", "qcow2") == b"\1" * (16 * MIB)


def test_a_full_alone_needs_nothing(stored: Stored) -> None:
    merge(request(stored), COMMIT)
    before = tree(stored.path)
    assert merge(Request(folder(stored)), COMMIT).plan.lines()[0].startswith("nothing to do")
    assert not merge(Request(folder(stored)), SNAPSHOTS).plan.superseded
    assert_unchanged(before, stored.path)


def test_copies_are_left_alone(stored: Stored, tmp_path: Path) -> None:
    copy = stored.add(Level.COPY, {DISK: [Write(9, 0, MIB)]})
    merge(request(stored), COMMIT)
    assert_right(stored, [stored.points[3], copy], tmp_path / "out")


def test_older_chains_are_left_alone(stored: Stored, tmp_path: Path) -> None:
    stored.add(Level.FULL, {DISK: [Write(9, 0, MIB)]})
    stored.add(Level.INC, {DISK: [Write(8, 0, 512)]})
    merge(request(stored), COMMIT)
    assert_right(stored, [*stored.points[:4], stored.points[5]], tmp_path / "out")
    merge(request(stored, until=3), COMMIT)
    assert_right(stored, [stored.points[3], stored.points[5]], tmp_path / "again")


def test_the_symlink_never_leads_to_a_file_that_was_merged(stored: Stored) -> None:
    link(Request(folder(stored)))
    merge(request(stored), COMMIT)
    assert (folder(stored) / "image").readlink() == Path(name(stored, 0))


def test_a_rate_limit_limits_and_changes_nothing_else(stored: Stored, tmp_path: Path) -> None:
    merge(Request(folder(stored), rate=64 * MIB), SNAPSHOTS)
    assert_right(stored, stored.points, tmp_path / "out")


def test_a_chain_of_many_images(tmp_path: Path) -> None:
    place = tmp_path / "deep"
    place.mkdir()
    run("qemu-img", "create", "-q", "-f", "qcow2", str(place / "FULL-100"), "8M")
    for number in range(101, 171):
        backing = ("-u", "-b", f"{'INC' if number > 101 else 'FULL'}-{number - 1}", "-F", "qcow2")
        image = str(place / f"INC-{number}")
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, image, "8M")
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number} {number}k 2k", image)
    expected = contents_of_link(place / "INC-169")
    newest = contents_of_link(place / "INC-170")
    merge(Request(place, until="INC-169"), COMMIT)
    assert sorted(each.name for each in place.iterdir()) == ["FULL-100", "INC-170"]
    assert contents_of_link(place / "FULL-100") == expected
    assert contents_of_link(place / "INC-170") == newest


# --- what is refused, and leaves everything as it was


@pytest.mark.parametrize("operation", Operation)
def test_a_differential_on_the_full_is_not_broken(
    stored: Stored, tmp_path: Path, operation: Operation
) -> None:
    stored.add(Level.DIFF, {DISK: [Write(6, 0, 512)]})
    before = tree(stored.path)
    with pytest.raises(UsageError, match=r"would destroy INC"):
        merge(request(stored), operation)
    with pytest.raises(UsageError, match=r"would destroy DIFF.*merge --targetfile"):
        merge(request(stored, until=3), operation)
    assert_unchanged(before, stored.path)
    assert_right(stored, stored.points, tmp_path / "out")


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_overlay_of_the_owner_is_not_broken(stored: Stored, tmp_path: Path, number: int) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder(stored), copied)
    for place in (folder(stored), copied):
        backing = ("-b", str(place / name(stored, number)), "-F", "qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(place / "mine.qcow2"))
        before = tree(place)
        with pytest.raises(UsageError, match=r"mine\.qcow2"):
            merge(Request(place), COMMIT)
        assert_unchanged(before, place)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("operation", Operation)
def test_damage_anywhere_in_the_chain_is_found_first(
    stored: Stored, number: int, operation: Operation
) -> None:
    flip(folder(stored) / name(stored, number), -100)
    before = tree(stored.path)
    with pytest.raises(DamagedError, match=name(stored, number)):
        merge(request(stored), operation)
    assert_unchanged(before, stored.path)


def test_damage_of_what_builds_on_the_chain_is_not_called_whole(stored: Stored) -> None:
    flip(folder(stored) / name(stored, 3), -100)
    before = tree(stored.path)
    for skip in (False, True):
        with pytest.raises(DamagedError, match=name(stored, 3)):
            merge(request(stored, until=2, skip_check=skip), COMMIT)
    assert_unchanged(before, stored.path)


def test_without_checks_lengths_and_links_still_count(stored: Stored, tmp_path: Path) -> None:
    file = folder(stored) / name(stored, 2)
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0")
    with pytest.raises(DamagedError, match="bytes instead of"):
        merge(request(stored, skip_check=True), COMMIT)
    file.write_bytes(whole)
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "FULL-9", str(file))
    with pytest.raises(DamagedError):
        merge(request(stored, skip_check=True), COMMIT)
    file.write_bytes(whole)
    merge(request(stored, skip_check=True), COMMIT)
    assert_right(stored, stored.points[-1:], tmp_path / "out")


def test_a_manifest_that_cannot_be_read_stops_everything(stored: Stored) -> None:
    stored.manifest(stored.points[2]).write_text("{}")
    before = tree(stored.path)
    for operation in Operation:
        with pytest.raises(DamagedError, match=stored.points[2].id):
            merge(request(stored), operation)
    assert_unchanged(before, stored.path)


def test_files_that_are_links_are_refused(stored: Stored, tmp_path: Path) -> None:
    file = folder(stored) / name(stored, 1)
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(DamagedError, match="not a plain file"):
        merge(request(stored, skip_check=True), COMMIT)
    assert elsewhere.exists()


def test_a_target_in_use_is_left_alone(stored: Stored) -> None:
    with stored.target.lock(write=True):
        for operation in Operation:
            with pytest.raises(Locked):
                merge(request(stored), operation)
        with pytest.raises(Locked):
            link(request(stored))
    with stored.target.lock(), pytest.raises(Locked):
        merge(request(stored), COMMIT)


@pytest.mark.parametrize("operation", Operation)
def test_too_little_room_is_said_before_anything_is_done(
    little_room: Path, operation: Operation
) -> None:
    stored = Stored(little_room / "target", size=16 * MIB)
    stored.add(Level.FULL, {DISK: [Write(1, 0, 12 * MIB)]})
    stored.add(Level.INC, {DISK: [Write(2, 0, MIB)]})
    before = tree(stored.path)
    for run_it in (merge, dry_run):
        with pytest.raises(StorageError, match="are free"):
            run_it(request(stored), operation)
    assert_unchanged(before, stored.path)


def test_room_that_runs_out_meanwhile_costs_nothing(little_room: Path, tmp_path: Path) -> None:
    stored = Stored(little_room / "target", size=16 * MIB)
    stored.add(Level.FULL, {DISK: [Write(1, 0, 8 * MIB)]})
    stored.add(Level.INC, {DISK: [Write(2, 0, MIB)]})
    before = tree(stored.path)

    built = r"open FULL-\d+\.partial"
    with held(built, "commit", "--dir", folder(stored), program="qmprestore") as running:
        free = shutil.disk_usage(little_room).free
        (little_room / "filler").write_bytes(bytes(free - 2 * MIB))
        running.signal(signal.SIGCONT)
        running.wait().check(7)
    (little_room / "filler").unlink()
    assert_unchanged(before, stored.path)
    merge(request(stored), COMMIT)
    assert_right(stored, stored.points[-1:], tmp_path / "out")


# --- dry runs


def test_a_dry_run_changes_nothing(stored: Stored, tmp_path: Path) -> None:
    before = tree(tmp_path)
    locks = sorted(stored.path.glob(".lock*"))
    until = ("--dir", folder(stored), "--until", name(stored, 2), "--dry-run")
    for program, command in (
        ("qmprebase", "rebase"),
        ("qmprestore", "commit"),
        ("qmprestore", "snapshotrebase"),
        ("qmprestore", "rebase"),
    ):
        done = cli.run(command, *until, program=program).check()
        assert name(stored, 2) in done.out
    assert_unchanged(before, tmp_path)
    assert sorted(stored.path.glob(".lock*")) == locks


# --- a new file


def test_an_export_leaves_the_backup_byte_for_byte(stored: Stored, tmp_path: Path) -> None:
    before = tree(stored.path)
    for number, point in enumerate(stored.points):
        output = tmp_path / "made" / "for" / f"disk{number}.qcow2"
        export(request(stored, until=number), output)
        assert contents(output, "qcow2") == stored.expected[point.id, DISK]
        info = json.loads(run("qemu-img", "info", "--output=json", str(output)))
        assert "backing-filename" not in info
    assert_unchanged(before, stored.path)
    assert len(list((tmp_path / "made" / "for").iterdir())) == 4


def test_an_export_never_replaces_a_file(stored: Stored, tmp_path: Path) -> None:
    output = tmp_path / "disk"
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export(request(stored), output)
    assert output.read_text() == "mine"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists"):
        export(request(stored), dangling)


def test_an_export_never_goes_into_the_backup(stored: Stored) -> None:
    before = tree(stored.path)
    for output in (folder(stored) / "new", stored.path / "points" / "new", stored.path / "x" / "y"):
        with pytest.raises(UsageError, match="backup itself"):
            export(request(stored), output)
    assert_unchanged(before, stored.path)


def test_an_export_of_damage_leaves_no_file(stored: Stored, tmp_path: Path) -> None:
    flip(folder(stored) / name(stored, 1), -100)
    with pytest.raises(DamagedError):
        export(request(stored), tmp_path / "out" / "disk")
    assert not (tmp_path / "out").exists()


def test_an_export_without_room_leaves_no_file(stored: Stored, little_room: Path) -> None:
    (little_room / "filler").write_bytes(bytes(20 * MIB))
    with pytest.raises(StorageError, match="are free"):
        export(request(stored), little_room / "disk")
    assert [each.name for each in little_room.iterdir()] == ["filler"]


# --- links


def test_linking_leaves_a_symlink_and_nothing_else(stored: Stored) -> None:
    before = tree(stored.path)
    for until in (None, 1, None):
        link(request(stored, until=until))
        wanted = name(stored, 3 if until is None else until)
        assert (folder(stored) / "image").readlink() == Path(wanted)
    shown = contents_of_link(folder(stored) / "image")
    assert shown == stored.expected[stored.points[3].id, DISK]
    assert_unchanged({**before, f"{DISK}/image": name(stored, 3)}, stored.path)


def test_linking_never_replaces_a_file(stored: Stored) -> None:
    (folder(stored) / "image").write_text("mine")
    with pytest.raises(UsageError, match="in the way"):
        link(request(stored))
    assert (folder(stored) / "image").read_text() == "mine"


# --- folders without manifests


@pytest.fixture
def copied(stored: Stored, tmp_path: Path) -> Path:
    """The folder of the disk alone, as `cp -a` makes it."""
    place = tmp_path / "copied"
    shutil.copytree(folder(stored), place)
    return place


def test_a_copied_folder_can_be_merged(stored: Stored, copied: Path) -> None:
    merge(Request(copied, until=name(stored, 2)), COMMIT)
    assert sorted(each.name for each in copied.iterdir()) == [name(stored, 0), name(stored, 3)]
    full, newest = sorted(copied.iterdir())
    assert contents(full, "qcow2") == stored.expected[stored.points[2].id, DISK]
    assert contents(newest, "qcow2") == stored.expected[stored.points[3].id, DISK]


def test_a_copied_folder_can_keep_its_states(stored: Stored, copied: Path) -> None:
    merge(Request(copied), SNAPSHOTS)
    (full,) = copied.iterdir()
    info = json.loads(run("qemu-img", "info", "--output=json", str(full)))
    assert len(info["snapshots"]) == 4
    for each, point in zip(info["snapshots"], stored.points, strict=True):
        raw = copied.with_name("raw")
        state = f"snapshot.name={each['name']}"
        run("qemu-img", "convert", "-O", "raw", "-l", state, str(full), str(raw))
        assert raw.read_bytes() == stored.expected[point.id, DISK]


def test_damage_in_a_copied_folder_is_found(stored: Stored, copied: Path) -> None:
    broken = copied / name(stored, 1)
    data = bytearray(broken.read_bytes())
    table = int.from_bytes(data[40:48])
    data[table : table + 8] = (0x8000_0000_0000_0000 | 0x7FFF_0000).to_bytes(8)
    broken.write_bytes(data)
    before = tree(copied)
    with pytest.raises(DamagedError, match=name(stored, 1)):
        merge(Request(copied), COMMIT)
    assert_unchanged(before, copied)


def test_an_unfinished_file_means_that_the_chain_may_be_broken(copied: Path) -> None:
    (copied / "INC-9999999999.partial").write_bytes(b"")
    before = tree(copied)
    for program, command in (("qmprebase", "rebase"), ("qmprestore", "rebase")):
        cli.run(command, "--dir", copied, program=program).check(8)
    assert_unchanged(before, copied)


@pytest.mark.parametrize(
    "backing", ["/etc/passwd", "../secret", "INC-1", "json:{}", "nbd://localhost/x"]
)
def test_a_link_that_leads_out_of_the_folder_is_damage(
    stored: Stored, copied: Path, tmp_path: Path, backing: str
) -> None:
    (copied.parent / "secret").write_bytes(b"secret" * 1000)
    file = str(copied / name(stored, 2))
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, file)
    before = tree(copied)
    where = ("--dir", copied)
    out = tmp_path / "out"
    for command in (("commit",), ("snapshotrebase",), ("rebase",), ("merge", "--targetfile", out)):
        cli.run(*command, *where, program="qmprestore").check(8)
        cli.run("--skip-check", *command, *where, program="qmprestore").check(8)
    assert_unchanged(before, copied)
    assert not out.exists()


def test_an_image_whose_data_lie_elsewhere_is_damage(copied: Path, stored: Stored) -> None:
    full = copied / name(stored, 0)
    full.unlink()
    secret = copied.parent / "data"
    options = ("-o", f"data_file={secret}", str(full), "4M")
    run("qemu-img", "create", "-q", "-f", "qcow2", *options)
    for command in ("commit", "rebase"):
        cli.run(command, "--dir", copied, program="qmprestore").check(8)


def test_links_to_the_folder_of_before_are_made_relative(stored: Stored, copied: Path) -> None:
    """The original tool leaves links with whole paths, which a copy still follows."""
    for number in (1, 2, 3):
        backing = str(folder(stored) / name(stored, number - 1))
        file = str(copied / name(stored, number))
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, file)
    with pytest.raises(DamagedError, match="another folder"):
        merge(Request(copied), COMMIT)
    link(Request(copied))
    shutil.rmtree(stored.path)
    shown = contents_of_link(copied / "image")
    assert shown == stored.expected[stored.points[3].id, DISK]
    merge(Request(copied), COMMIT)


@pytest.fixture
def original(stored: Stored, tmp_path: Path) -> Path:
    """A folder of the original tool: its names, no links, another chain before, other files."""
    place = tmp_path / "original"
    place.mkdir()
    for number in range(4):
        kind = "FULL" if number == 0 else "INC"
        file = place / f"{kind}-{9 + number}-disk1.qcow2"
        shutil.copy(folder(stored) / name(stored, number), file)
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", str(file))
    older = str(place / "FULL-1-disk1.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", older, "4M")
    (place / "uuid").write_text("0815")
    (place / "disk1.qcow2.config").write_text("{}")
    return place


def test_linking_a_folder_of_the_original_tool(stored: Stored, original: Path) -> None:
    done = cli.run("rebase", "--dir", original, program="qmprestore").check()
    assert "INC-12-disk1.qcow2" in done.out
    assert "INC-10-disk1.qcow2 builds on FULL-9-disk1.qcow2" in done.err
    shown = contents_of_link(original / "image")
    assert shown == stored.expected[stored.points[3].id, DISK]
    cli.run("commit", "--dir", original, program="qmprestore").check()
    merged = contents(original / "FULL-9-disk1.qcow2", "qcow2")
    assert merged == stored.expected[stored.points[3].id, DISK]
    assert sorted(each.name for each in original.iterdir()) == [
        "FULL-1-disk1.qcow2",
        "FULL-9-disk1.qcow2",
        "disk1.qcow2.config",
        "image",
        "uuid",
    ]


@pytest.mark.parametrize("command", ["commit", "snapshotrebase"])
def test_without_links_merging_needs_to_be_asked_for(
    stored: Stored, original: Path, command: str
) -> None:
    before = tree(original)
    done = cli.run(command, "--dir", original, program="qmprestore").check(2)
    assert "qmprestore rebase" in done.err
    assert_unchanged(before, original)
    cli.run("--skip-check", command, "--dir", original, program="qmprestore").check()
    merged = contents(original / "FULL-9-disk1.qcow2", "qcow2")
    assert merged == stored.expected[stored.points[3].id, DISK]


def test_exporting_from_a_folder_of_the_original_tool(
    stored: Stored, original: Path, tmp_path: Path
) -> None:
    before = tree(original)
    where = ("--dir", original, "--targetfile", tmp_path / "new", "--until", "INC-11-disk1.qcow2")
    cli.run("merge", *where, program="qmprestore").check()
    assert contents(tmp_path / "new", "qcow2") == stored.expected[stored.points[2].id, DISK]
    assert_unchanged(before, original)


def test_disks_that_share_a_folder_are_told_apart_by_filter(stored: Stored, original: Path) -> None:
    for each in sorted(original.glob("*-disk1.qcow2")):
        shutil.copy(each, each.with_name(each.name.replace("disk1", "disk2")))
    done = cli.run("rebase", "--dir", original, program="qmprestore").check(2)
    assert "--filter" in done.err
    where = ("--dir", original, "--filter", "disk2")
    cli.run("--skip-check", "commit", *where, program="qmprestore").check()
    merged = contents(original / "FULL-9-disk2.qcow2", "qcow2")
    assert merged == stored.expected[stored.points[3].id, DISK]
    assert (original / "INC-12-disk1.qcow2").exists()


def test_images_that_are_not_qcow2_are_refused(original: Path) -> None:
    (original / "INC-13-disk1.qcow2").write_bytes(bytes(MIB))
    before = tree(original)
    for command in (("rebase",), ("commit", "--skip-check")):
        done = cli.run(*command, "--dir", original, program="qmprestore").check(8)
        assert "INC-13-disk1.qcow2 is not a qcow2 image" in done.err
    assert_unchanged(before, original)


# --- the commands


def test_an_interrupted_build_leaves_the_backup_as_it_was(stored: Stored) -> None:
    before = tree(stored.path)
    where = ("--dir", folder(stored), "--rate-limit", "16K")
    with cli.start("commit", *where, program="qmprestore") as running:
        wait_until(lambda: list(folder(stored).glob("*.partial")))
        running.signal(signal.SIGINT)
        running.wait().check(130)
    assert_unchanged(before, stored.path)


def test_the_commands_of_the_original(stored: Stored) -> None:
    done = cli.run("rebase", "--dir", folder(stored), program="qmprebase").check()
    assert re.search(r"FULL-\d+ holds the state of INC-\d+", done.out)
    assert len(list(folder(stored).iterdir())) == 1
    again = cli.run("rebase", "--dir", f"{folder(stored)}/", program="qmprebase").check()
    assert "nothing to do" in again.out


def test_where_skip_check_stands_does_not_matter(stored: Stored, tmp_path: Path) -> None:
    flip(folder(stored) / name(stored, 0), -100)
    where = ("--dir", folder(stored), "--targetfile")
    cli.run("merge", *where, tmp_path / "0", program="qmprestore").check(8)
    cli.run("--skip-check", "merge", *where, tmp_path / "1", program="qmprestore").check()
    cli.run("merge", *where, tmp_path / "2", "--skip-check", program="qmprestore").check()
    rate = ("--rate-limit", "50M")
    cli.run("--skip-check", "merge", *where, tmp_path / "3", *rate, program="qmprestore").check()


def test_states_of_one_second_are_kept_again_by_a_later_merge(
    stored: Stored, tmp_path: Path
) -> None:
    with stored.target.lock(remove=True):
        for point in stored.points:
            stored.target.replace_manifest(replace(point, time=stored.points[0].time))
    merge(request(stored), SNAPSHOTS)
    reload(stored)
    stored.add(Level.INC, {DISK: [Write(5, 2 * MIB, 65536)]})
    merge(request(stored), SNAPSHOTS)
    assert_right(stored, stored.points, tmp_path / "out")


def test_what_is_wrong_is_said_in_a_sentence_with_its_exit_code(
    stored: Stored, tmp_path: Path
) -> None:
    def restored(*arguments: str | Path) -> cli.Result:
        result = cli.run(*arguments, program="qmprestore")
        assert "Traceback" not in result.err
        return result

    wrong = restored("commit", "--dir", folder(stored), "--until", "INC-1").check(2)
    assert name(stored, 3) in wrong.err, "the candidates are named"
    assert DISK in restored("commit", "--dir", stored.path).check(2).err
    restored("commit", "--dir", tmp_path / "nowhere").check(10)
    (tmp_path / "empty").mkdir()
    restored("rebase", "--dir", tmp_path / "empty").check(10)
    restored("commit", "--dir", folder(stored), "--rate-limit", "fast").check(2)


def contents_of_link(path: Path) -> bytes:
    """What QEMU shows through a symbolic link, with the whole chain below."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        run("qemu-img", "convert", "-O", "raw", str(path), str(raw))
        return raw.read_bytes()
