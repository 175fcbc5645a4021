# SPDX-License-Identifier: Apache-2.0
"""Points that earlier versions made are listed, verified, restored, continued and pruned.

The archives in `tests/earlier` are made by `scripts/earlier-points.py`, one for each version whose points
differ from those before.
"""

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import assert_clean
from lab.backups import assert_restores, back_up, levels, restored
from lab.disks import Disk
from lab.qemu import Qemu, StartQemu
from lab.repositories import Repository, Target, environment_of

ARCHIVES = sorted((Path(__file__).parent.parent / "earlier").glob("*.tar.xz"))
NAME, UUID = "earlier", "3f0c8a52-9a70-4a4e-8d0c-1c5e8e2f7b11"
KINDS = {"folder": 5, "repository": 3}
"""How many points each target holds."""


@dataclass(frozen=True)
class Earlier:
    """An unpacked archive: one target of it, and what its points must give back."""

    folder: Path
    target: Target
    count: int

    @property
    def expected(self) -> dict[str, dict[str, str]]:
        """SHA-256 of each disk, by point."""
        found: dict[str, dict[str, str]] = json.loads((self.folder / "expected.json").read_text())
        return found

    def points(self) -> list[str]:
        """The ids of all points that are listed, the oldest first."""
        listed = self.run("list", "--json").check()
        return [json.loads(line)["id"] for line in listed.out.splitlines()]

    def run(self, command: str, *more: cli.Argument) -> cli.Result:
        """A command on the target."""
        return cli.run(
            command, "--target", str(self.target), *more, env=environment_of(self.target)
        )

    def start(self, start_qemu: StartQemu) -> Qemu:
        """The VM that the points are of, as it was when it ended."""
        images = self.folder / "images"
        disks = [
            Disk("vda", images / "vda.qcow2"),
            Disk("vdb", images / "vdb.raw", "raw"),
        ]
        return start_qemu(disks, name=NAME, uuid=UUID)


@pytest.fixture(
    params=[(archive, kind) for archive in ARCHIVES for kind in KINDS],
    ids=lambda each: f"{each[0].name.partition('.')[0]}-{each[1]}",
)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Earlier:
    """Each target of each archive."""
    archive, kind = request.param
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
        tar.extractall(tmp_path)  # noqa: S202 - the archive is the repository's own
    folder = tmp_path / "folder"
    target = folder if kind == "folder" else Repository(str(tmp_path / "repository"), tmp_path)
    return Earlier(tmp_path, target, KINDS[kind])


def test_they_are_listed_and_whole(earlier: Earlier) -> None:
    points = earlier.points()
    assert len(points) == earlier.count
    assert set(points) <= set(earlier.expected)
    earlier.run("verify").check()


def test_every_one_gives_back_its_bytes(earlier: Earlier, tmp_path: Path) -> None:
    for point in earlier.points():
        found = restored(earlier.target, point, tmp_path)
        digests = {disk: hashlib.sha256(data).hexdigest() for disk, data in found.items()}
        assert digests == earlier.expected[point]


def test_the_next_backup_is_an_incremental(
    earlier: Earlier, tmp_path: Path, start_qemu: StartQemu
) -> None:
    vm = earlier.start(start_qemu)
    before = earlier.points()
    point = back_up(vm, earlier.target)
    assert levels(point)["vda"] == "inc"
    assert earlier.points() == [*before, point["id"]]
    live = vm.live()
    assert {disk: hashlib.sha256(data).hexdigest() for disk, data in live.items()} == (
        earlier.expected["at last"]
    )
    assert_restores(earlier.target, point["id"], live, tmp_path)
    assert_clean(vm, earlier.target)


def test_what_a_policy_keeps_after_pruning_is_whole(earlier: Earlier, tmp_path: Path) -> None:
    last = earlier.points()[-1]
    earlier.run("prune", "--keep-last", "1").check()
    assert last in earlier.points()
    found = restored(earlier.target, last, tmp_path)
    digests = {disk: hashlib.sha256(data).hexdigest() for disk, data in found.items()}
    assert digests == earlier.expected[last]
    earlier.run("verify").check()
