# SPDX-License-Identifier: Apache-2.0
"""What restic may do to snapshots that are points: they stay points, or it is said why they are none.

With the restic of PATH; `scripts/test-versions.sh` runs the same with the one of a newer Debian.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab import cli
from lab.repositories import Repository
from lab.restic import Restic
from stock.stored_repository import StoredRepository

DAMAGED, NONE = 8, 10
DISKS = {"vda": b"a" * 5000, "vdb": b"b" * 7000}
REWRITE = (0, 15)
REPAIR = (0, 16)
NEW_HOST = (0, 17)


@pytest.fixture
def stored(tmp_path: Path) -> StoredRepository:
    """Two points of two disks, and a snapshot of files that is none of ours."""
    made = StoredRepository(tmp_path / "stored")
    for number in (1, 2):
        made.add({name: data + bytes([number]) for name, data in DISKS.items()})
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    # Like a point in all that is easily seen.
    (theirs / "manifest.json").write_text("{}")
    (theirs / "page.html").write_text("precious")
    made.made.restic("backup", theirs)
    return made


def require(restic: Restic, version: tuple[int, int]) -> None:
    if restic.version < version:
        pytest.skip(f"this restic is {restic.version}")


def run(stored: StoredRepository, command: str, *more: cli.Argument) -> cli.Result:
    """A command, which has no cache to go by."""
    environment = {**stored.made.environment, "RESTIC_CACHE_DIR": str(stored.folder / "no-cache")}
    return cli.run(command, "--target", str(stored.made), *more, env=environment)


def found(stored: StoredRepository) -> list[str]:
    return [each["id"] for each in run(stored, "list", "--json").check().objects]


def assert_all_there(stored: StoredRepository, out: Path) -> None:
    """Both points are listed, whole, and give back their bytes."""
    assert found(stored) == [point.id for point in stored.points]
    run(stored, "verify").check()
    for point in stored.points:
        where = out / point.id
        run(stored, "restore", "--point", point.id, "--output", where, "--format", "raw").check()
        for disk in DISKS:
            assert (where / f"{disk}.raw").read_bytes() == stored.expected[point.id, disk]


def snapshots(stored: StoredRepository) -> Iterator[str]:
    """Ids of the snapshots of points."""
    return (each["id"] for each in stored.made.snapshots() if each["paths"] == ["/vm"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "mine"],
        ["--set", ""],
        ["--add", "mine,point=other"],
        ["--remove", "qmpbackup"],
        ["--remove", "vm=vm"],
        ["--remove", "qmpbackup,vm=vm,uuid=7a1c7e7e-6f0c-4d3c-9a27-0d5c1f1c2b3a"],
    ],
    ids=" ".join,
)
def test_tags(stored: StoredRepository, tmp_path: Path, arguments: list[str]) -> None:
    stored.made.restic("tag", *arguments)
    assert_all_there(stored, tmp_path / "out")
    run(stored, "prune", "--keep-last", "1").check()
    assert found(stored) == [stored.points[1].id]
    assert len(stored.made.snapshots()) == 2


def test_a_parent_that_was_forgotten(stored: StoredRepository, tmp_path: Path) -> None:
    stored.made.restic("forget", "--prune", stored.made.snapshot_of(stored.points[0].id)["id"])
    del stored.points[0]
    assert_all_there(stored, tmp_path / "out")


def test_copied_elsewhere(stored: StoredRepository, tmp_path: Path) -> None:
    """The points are the same VM's there."""
    elsewhere = StoredRepository(tmp_path / "elsewhere")
    elsewhere.points, elsewhere.expected = stored.points, stored.expected
    restic = elsewhere.made.restic
    password = {"RESTIC_FROM_PASSWORD": stored.made.password}
    source = ["--from-repo", stored.made.location]
    if restic.version < (0, 14):
        pytest.skip("copies the other way round")
    replace(restic, environment=password)("copy", *source)
    assert_all_there(elsewhere, tmp_path / "out")
    # Once more, in a repository that has them already under other names.
    replace(restic, environment=password)("copy", *source)
    assert_all_there(elsewhere, tmp_path / "again")


@pytest.mark.parametrize("forget", [True, False])
def test_a_disk_that_was_excluded(stored: StoredRepository, tmp_path: Path, forget: bool) -> None:
    """The points hold what is left; where the old ones are still there, they count."""
    require(stored.made.restic, REWRITE)
    forgetting = ["--forget"] if forget else []
    stored.made.restic("rewrite", *forgetting, "--exclude", "/vm/vdb.raw", *snapshots(stored))
    if not forget:
        assert_all_there(stored, tmp_path / "out")
        run(stored, "prune", "--keep-last", "1").check()
        assert found(stored) == [stored.points[1].id]
        assert len(list(snapshots(stored))) == 2
        return
    listed = run(stored, "list", "--json").check().objects
    assert [each["disks"] for each in listed] == [["vda"], ["vda"]]
    assert "vdb (removed from the snapshot by restic)" in run(stored, "show").check().out
    run(stored, "restore", "--output", tmp_path / "out", "--format", "raw").check()
    last = stored.points[-1].id
    assert (tmp_path / "out" / "vda.raw").read_bytes() == stored.expected[last, "vda"]
    run(stored, "verify").check()


def test_a_manifest_that_was_excluded(stored: StoredRepository) -> None:
    """It looks like a point and is none: it is named, and why."""
    require(stored.made.restic, REWRITE)
    name = stored.made.snapshot_of(stored.points[0].id)["id"]
    stored.made.restic("rewrite", "--forget", "--exclude", "manifest.json", name)
    listed = run(stored, "list").check(DAMAGED)
    assert "holds no manifest" in listed.err
    assert stored.points[1].id in listed.out


@pytest.mark.parametrize("uuid", [True, False])
def test_another_host(stored: StoredRepository, tmp_path: Path, uuid: bool) -> None:
    """The manifest says on which host a point was made."""
    require(stored.made.restic, NEW_HOST)
    if not uuid:
        stored.vm, stored.points = replace(stored.vm, uuid="", host="hv2"), []
        stored.add({name: data + b"x" for name, data in DISKS.items()})
    stored.made.restic("rewrite", "--forget", "--new-host", "elsewhere", *snapshots(stored))
    if uuid:
        assert_all_there(stored, tmp_path / "out")
        return
    listed = run(stored, "list", "--vm", "hv2/vm", "--json").check().objects
    assert [each["id"] for each in listed] == [point.id for point in stored.points]


def test_repaired(stored: StoredRepository, tmp_path: Path) -> None:
    """Of a disk that lost chunks, restic keeps what is left: refused, not restored in part."""
    require(stored.made.restic, REPAIR)
    pack = Path(stored.made.location) / "data"
    index = stored.made.restic("list", "blobs").text
    assert index
    last = stored.points[-1].id
    name = stored.made.snapshot_of(last)["id"]
    node = next(
        each
        for each in stored.made.restic("ls", "--json", name).objects
        if each.get("path") == "/vm/vdb.raw"
    )
    assert node["size"] == len(stored.expected[last, "vdb"])
    blob = blob_of(stored.made, name)
    for file in pack_of(stored.made, blob, pack):
        file.unlink()
    stored.made.restic("repair", "index")
    stored.made.restic("repair", "snapshots", "--forget", check=False)
    result = run(stored, "restore", "--point", last, "--output", tmp_path / "out")
    assert result.code in {DAMAGED, NONE}, str(result)
    assert result.err.strip()


def blob_of(made: Repository, snapshot: str) -> str:
    """The id of the first chunk of vdb in a snapshot."""
    tree = made.restic("cat", "snapshot", snapshot).json["tree"]
    (folder,) = made.restic("cat", "blob", tree).json["nodes"]
    nodes = made.restic("cat", "blob", folder["subtree"]).json["nodes"]
    return str(next(each["content"][0] for each in nodes if each["name"] == "vdb.raw"))


def pack_of(made: Repository, blob: str, data: Path) -> list[Path]:
    """The packs in which a blob lies."""
    found = made.restic("find", "--blob", blob, "--show-pack-id").text
    return [each for each in data.glob("*/*") if each.name in found or each.name[:8] in found]
