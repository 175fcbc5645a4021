# SPDX-License-Identifier: Apache-2.0
"""The directory target: whose it is, who may use it at once, what it trusts, what it removes."""

import os
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qmpbackup.errors import DamagedError, Locked, NoSuchTarget, StorageError, UsageError
from qmpbackup.model import Level, VmIdentity
from qmpbackup.targets.folder.opening import FolderOpening
from qmpbackup.targets.folder.target import DirectoryTarget
from qmpbackup.targets.interface import Wish
from stock.stored import MIB, VM, Stored, Write

NOW = datetime(2026, 11, 2, 3, 4, 5, tzinfo=UTC)
ID = "20261102T030405Z-abcdef"
ROOT = os.geteuid() == 0


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "target", size=MIB)


def test_a_new_target_is_readable_by_its_owner_alone(stored: Stored) -> None:
    stored.add(Level.FULL, {"hd0": [Write(1, 0, 4096)]})
    for path in (stored.path, *stored.path.rglob("*")):
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("umask", ["000", "022", "077"])
def test_nobody_else_may_write_into_what_is_made(tmp_path: Path, umask: str) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from qmpbackup.model import VmIdentity\n"
        "from qmpbackup.targets.folder.target import DirectoryTarget\n"
        "os.umask(int(sys.argv[1], 8))\n"
        "DirectoryTarget.open_or_create(Path(sys.argv[2]), VmIdentity(name='vm'))\n"
    )
    place = tmp_path / "one" / "two" / "target"
    subprocess.run([sys.executable, "-c", program, umask, str(place)], check=True)
    for path in (place.parent.parent, place.parent, place, *place.iterdir()):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


def test_the_id_stays(stored: Stored) -> None:
    again = DirectoryTarget.open_or_create(stored.path, VM)
    assert again.id == stored.target.id == DirectoryTarget.open(stored.path).id
    assert len(again.id) == 8


def test_the_user_may_choose_the_id_of_a_new_target(tmp_path: Path) -> None:
    assert DirectoryTarget.open_or_create(tmp_path / "t", VM, uuid="nightly.1").id == "nightly.1"
    assert DirectoryTarget.open_or_create(tmp_path / "t", VM, id_hint="other").id == "nightly.1"
    with pytest.raises(UsageError, match=r"nightly\.1"):
        DirectoryTarget.open_or_create(tmp_path / "t", VM, uuid="weekly")
    with pytest.raises(UsageError, match="cannot be the id"):
        DirectoryTarget.open_or_create(tmp_path / "u", VM, uuid="a:b")
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    ("stored_vm", "vm", "same"),
    [
        (VM, VM, True),
        (VM, VmIdentity(VM.uuid.upper(), "renamed", "/other"), True),
        (VM, VmIdentity("11111111-1111-1111-1111-111111111111", "vm", VM.address), False),
        (VM, VmIdentity("", "vm", "/other"), True),
        (VM, VmIdentity(VM.uuid, "vm", "/other", "another"), True),
        (VmIdentity("", "vm", "/vm", "one"), VmIdentity("", "vm", "/vm", "two"), False),
        (VmIdentity("", "", "/vm", "one"), VmIdentity("", "", "/vm", "two"), False),
        (VmIdentity("", "vm", "/vm", "one"), VmIdentity("", "vm", "/vm", "one"), True),
        (VmIdentity("", "vm", "/vm"), VmIdentity("", "vm", "/vm", "one"), True),
        (VM, VmIdentity("", "other", VM.address), False),
        (VM, VmIdentity("", "", VM.address), True),
        (VM, VmIdentity("", "", "/other"), False),
    ],
)
def test_another_vm_is_refused(
    tmp_path: Path, stored_vm: VmIdentity, vm: VmIdentity, same: bool
) -> None:
    DirectoryTarget.open_or_create(tmp_path / "t", stored_vm)
    if same:
        DirectoryTarget.open_or_create(tmp_path / "t", vm)
        return
    with pytest.raises(UsageError, match="belongs to another VM"):
        DirectoryTarget.open_or_create(tmp_path / "t", vm)


def test_looking_creates_nothing(tmp_path: Path) -> None:
    assert DirectoryTarget.peek(tmp_path / "none") is None
    assert DirectoryTarget.peek(tmp_path) is None
    with pytest.raises(NoSuchTarget):
        DirectoryTarget.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_target_may_be_given_by_a_link(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(stored.path)
    assert DirectoryTarget.open(tmp_path / "link").path == stored.path.resolve()


def test_files_are_never_overwritten(stored: Stored) -> None:
    """A folder of the original tool's may hold files of the very second."""
    epoch = int(NOW.timestamp())
    (stored.path / "hd0").mkdir()
    (stored.path / "hd0" / f"FULL-{epoch}").write_text("theirs")
    (stored.path / "hd1").mkdir()
    (stored.path / "hd1" / f"INC-{epoch + 1}.partial").write_text("theirs")
    pending = stored.target.begin(ID, [("hd0", Level.INC), ("hd1", Level.FULL)], NOW)
    assert [file.name for file in pending.files.values()] == [
        f"hd0/INC-{epoch + 2}",
        f"hd1/FULL-{epoch + 2}",
    ]
    pending.abort()
    assert (stored.path / "hd0" / f"FULL-{epoch}").read_text() == "theirs"


def test_a_point_that_was_given_up_leaves_nothing(stored: Stored) -> None:
    before = sorted(stored.path.rglob("*"))
    stored.target.begin(ID, [("hd0", Level.FULL)], NOW).abort()
    assert [path for path in sorted(stored.path.rglob("*")) if path.name != "points"] == before


def test_a_manifest_that_does_not_fit_its_files_is_not_committed(stored: Stored) -> None:
    first = stored.add(Level.FULL, {"hd0": []})
    pending = stored.target.begin(ID, [("hd0", Level.FULL)], NOW)
    with pytest.raises(ValueError, match="does not match"):
        pending.commit(first)
    pending.abort()
    assert stored.target.load().points == (first,)


def test_points_come_back_in_the_order_of_their_commits(stored: Stored) -> None:
    for level in (Level.FULL, Level.INC, Level.INC):
        stored.add(level, {"hd0": [Write(1, 0, 512)]})
    inventory = stored.target.load()
    assert inventory.points == tuple(stored.points)
    assert inventory.damaged == ()


def test_a_damaged_manifest_hides_no_other(stored: Stored) -> None:
    first, second = (stored.add(Level.FULL, {"hd0": []}) for _ in range(2))
    stored.manifest(first).write_text("{}")
    inventory = stored.target.load()
    assert inventory.points == (second,)
    assert [each.path for each in inventory.damaged] == [f"points/{first.id}.json"]


def test_a_manifest_under_another_name_is_damage(stored: Stored) -> None:
    point = stored.add(Level.FULL, {"hd0": []})
    copy = stored.path / "points" / "20261102T090000Z-ffffff.json"
    copy.write_bytes(stored.manifest(point).read_bytes())
    inventory = stored.target.load()
    assert inventory.points == (point,)
    assert "another point" in inventory.damaged[0].reason


def test_a_lost_vm_file_stops_writing_and_not_reading(stored: Stored) -> None:
    point = stored.add(Level.FULL, {"hd0": []})
    (stored.path / "vm.json").unlink()
    inventory = DirectoryTarget.open(stored.path).load()
    assert inventory.points == (point,)
    assert [each.path for each in inventory.damaged] == ["vm.json"]
    with pytest.raises(DamagedError):
        DirectoryTarget.open_or_create(stored.path, VM)


def test_a_chain_that_can_be_built_upon_passes_the_quick_check(stored: Stored) -> None:
    stored.add(Level.FULL, {"hd0": []})
    last = stored.add(Level.INC, {"hd0": []})
    assert stored.target.quick_check(last, "hd0", stored.points) == ""


def test_the_quick_check_sees_every_file_of_the_chain(stored: Stored) -> None:
    first = stored.add(Level.FULL, {"hd0": []})
    last = stored.add(Level.INC, {"hd0": []})
    with stored.file(first, "hd0").open("ab") as file:
        file.write(b"x")
    assert "bytes instead of" in stored.target.quick_check(last, "hd0", stored.points)
    stored.file(first, "hd0").unlink()
    assert "missing" in stored.target.quick_check(last, "hd0", stored.points)
    assert first.id in stored.target.quick_check(last, "hd0", [last])


class TestLocks:
    """Readers and one writer together; whoever removes is alone."""

    def test_readers_and_a_writer_go_together(self, stored: Stored) -> None:
        other = DirectoryTarget.open(stored.path)
        with stored.target.lock(), other.lock(), other.lock(write=True):
            pass

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"write": True}, {"write": True}),
            ({"write": True}, {"remove": True}),
            ({"remove": True}, {"write": True}),
            ({"remove": True}, {}),
            ({}, {"remove": True}),
            ({"remove": True}, {"remove": True}),
        ],
        ids=str,
    )
    def test_the_others_wait_or_leave(
        self, stored: Stored, first: dict[str, bool], second: dict[str, bool]
    ) -> None:
        other = DirectoryTarget.open(stored.path)
        with stored.target.lock(**first), pytest.raises(Locked), other.lock(**second):
            pass
        with other.lock(**second):
            pass

    def test_a_lock_ends_with_its_process(self, stored: Stored) -> None:
        code = (
            "import os, sys\nfrom pathlib import Path\n"
            "from qmpbackup.targets.folder.target import DirectoryTarget\n"
            "with DirectoryTarget.open(Path(sys.argv[1])).lock(write=True):\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", code, str(stored.path)], check=False, env=environ())
        with stored.target.lock(write=True):
            pass


class TestHostile:
    """Whoever can write into a target cannot make us touch anything outside it."""

    def test_a_linked_folder_of_a_disk_is_refused(self, stored: Stored, tmp_path: Path) -> None:
        (tmp_path / "victim").mkdir()
        (stored.path / "hd0").symlink_to(tmp_path / "victim")
        with pytest.raises(DamagedError, match="not a folder of its own"):
            stored.target.begin(ID, [("hd0", Level.FULL)], NOW)
        assert list((tmp_path / "victim").iterdir()) == []

    def test_a_linked_file_is_not_read(self, stored: Stored, tmp_path: Path) -> None:
        point = stored.add(Level.FULL, {"hd0": []})
        file = stored.file(point, "hd0")
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        assert stored.target.quick_check(point, "hd0", [point])
        with pytest.raises(DamagedError, match="not a plain file"):
            stored.target.open_file(f"hd0/{file.name}")

    def test_a_linked_manifest_is_damage(self, stored: Stored, tmp_path: Path) -> None:
        point = stored.add(Level.FULL, {"hd0": []})
        manifest = stored.manifest(point)
        manifest.rename(tmp_path / "elsewhere")
        manifest.symlink_to(tmp_path / "elsewhere")
        inventory = stored.target.load()
        assert inventory.points == ()
        assert "not a plain file" in inventory.damaged[0].reason

    def test_a_pipe_in_the_place_of_a_manifest_does_not_hang(self, stored: Stored) -> None:
        stored.add(Level.FULL, {"hd0": []})
        os.mkfifo(stored.path / "points" / f"{ID}.json")
        assert len(stored.target.load().damaged) == 1

    def test_a_journal_removes_nothing_but_backup_files_of_its_target(
        self, stored: Stored, tmp_path: Path
    ) -> None:
        stored.add(Level.FULL, {"hd0": []})
        victim = tmp_path / "FULL-1"
        victim.write_text("mine")
        (stored.path / "hd9").symlink_to(tmp_path)
        journals = [
            '{"schema":1,"files":["../FULL-1"],"folders":[]}',
            '{"schema":1,"files":["hd9/../../FULL-1"],"folders":[]}',
            '{"schema":1,"files":["points/FULL-1"],"folders":[".."]}',
            '{"schema":1,"files":["vm.json"],"folders":[]}',
            "rubbish",
        ]
        for number, journal in enumerate(journals):
            (stored.path / "points" / f"x{number}.pending").write_text(journal)
        assert len(stored.target.recover()) == len(journals)
        linked = '{"schema":1,"files":["hd9/FULL-1"],"folders":[]}'
        (stored.path / "points" / "y.pending").write_text(linked)
        with pytest.raises(DamagedError):
            stored.target.recover()
        assert victim.read_text() == "mine"
        assert stored.target.load().points == tuple(stored.points)

    @pytest.mark.skipif(not ROOT, reason="only root can give files away")
    def test_a_target_of_another_user_is_not_written_to(self, stored: Stored) -> None:
        os.chown(stored.path, 65534, 65534)
        with pytest.raises(StorageError, match="belongs to another user"):
            DirectoryTarget.open_or_create(stored.path, VM)
        assert DirectoryTarget.open(stored.path).id == stored.target.id

    def test_a_target_that_everybody_may_write_to_is_not_written_to(self, stored: Stored) -> None:
        stored.path.chmod(0o777)
        with pytest.raises(StorageError, match="Everybody may write"):
            DirectoryTarget.open_or_create(stored.path, VM)
        with pytest.raises(StorageError, match="Everybody may write"):
            stored.target.begin(ID, [("hd0", Level.FULL)], NOW)


def environ() -> dict[str, str]:
    """Our environment, with the product where this process found it."""
    import qmpbackup

    return {**os.environ, "PYTHONPATH": str(Path(qmpbackup.__file__).parents[1])}


@pytest.mark.parametrize("wish", [Wish(look_only=True), Wish(look_only=True, uuid="another")])
def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, wish: Wish) -> None:
    DirectoryTarget.open_or_create(tmp_path, VM, uuid="mine")
    who = VM if wish.uuid else VmIdentity("", "other", VM.address)
    with pytest.raises(UsageError), FolderOpening(tmp_path, wish).found(who):
        pass
    with FolderOpening(tmp_path, Wish(look_only=True)).found(VM) as found:
        assert found.target is None
