# SPDX-License-Identifier: Apache-2.0
"""A target that goes away under a run, after the instant: unmounted, moved, replaced, made read-only.

The run ends with a sentence and without a point, nothing is made where the target was, and once it is
back, the next run goes on incrementally.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import cli
from lab.aftermath import manifests
from lab.backups import leftovers
from lab.proxy import Place, Proxy
from lab.repositories import Repository
from lab.rest_server import RestServer
from lab.servers import BUCKET, KEYS, s3_server
from lab.small import needs_root
from qmpbackup.restic.storage.interface import CONFIG, Missing
from qmpbackup.restic.storage.location import connect
from stock.repositories import made, repository
from stock.scene import WHERE, Scene, Where, scene

STORAGE = 7

Accident = Callable[[], None]


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest) -> Where:
    found: Where = request.param
    return found


def run_with(stage: Scene, accident: Accident) -> cli.Result:
    """An incremental that meets with an accident as soon as its instant is over."""
    done: list[int] = []

    def meet(_proxy: Proxy, at: Place) -> None:
        if at.command == "cont" and at.when == "after" and not done:
            done.append(at.number)
            accident()

    path = stage.vm.folder / "proxy"
    with Proxy(path, stage.vm.socket, meet):
        result = stage.run("inc", socket=path)
    assert done
    return result


def assert_given_up(stage: Scene, result: cli.Result) -> None:
    """The run says why, and there is no point and nothing left in the VM."""
    result.check(STORAGE)
    assert "Point " not in result.out
    assert result.err.count("error: ") == 2, "a sentence, and what to do"
    assert leftovers(stage.vm) == []


def make_target(stage: Scene, where: Where, place: Path) -> None:
    """A target at this place, with a full in it."""
    if where == "repository":
        stage.repository = repository(place)
    else:
        stage.target = place / "target"
    stage.run("full").check()
    stage.write()


def folder_of(stage: Scene) -> Path:
    """Where the target lies."""
    return Path(stage.repository.location) if stage.repository else stage.target


@needs_root
def test_unmounted(tmp_path: Path, where: Where) -> None:
    """As an automounter does, or somebody who pulls a disk: open descriptors still lead to it."""
    with scene(tmp_path, where) as stage, mounted(tmp_path / "mount") as mount:
        make_target(stage, where, mount)
        before = len(manifests(stage.place))

        def unmount() -> None:
            subprocess.run(["umount", "-l", str(mount)], check=True)

        result = run_with(stage, unmount)
        assert_given_up(stage, result)
        assert [*mount.iterdir()] == []
        bind(mount)
        assert len(manifests(stage.place)) == before
        stage.make_good("inc")


@contextmanager
def mounted(path: Path) -> Iterator[Path]:
    """A folder that can be unmounted, and mounted again by `bind`."""
    path.mkdir()
    _behind(path).mkdir()
    bind(path)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def bind(path: Path) -> None:
    subprocess.run(["mount", "--bind", str(_behind(path)), str(path)], check=True)


def _behind(path: Path) -> Path:
    return path.with_name(f"{path.name}-behind")


@needs_root
def test_mounted_read_only(tmp_path: Path) -> None:
    """Under a folder's run it cannot happen: the kernel refuses while files are open for writing."""
    with scene(tmp_path, "repository") as stage, mounted(tmp_path / "mount") as mount:
        make_target(stage, "repository", mount)

        def remount(how: str) -> None:
            subprocess.run(["mount", "-o", f"remount,bind,{how}", str(mount)], check=True)

        assert_given_up(stage, run_with(stage, lambda: remount("ro")))
        remount("rw")
        stage.make_good("inc")


@pytest.mark.parametrize("instead", ["nothing", "an empty folder", "another target"])
def test_moved_away(tmp_path: Path, where: Where, instead: str) -> None:
    with scene(tmp_path, where) as stage:
        make_target(stage, where, tmp_path / "place")
        place, aside = folder_of(stage), tmp_path / "aside"
        other = tmp_path / "other" / place.name
        if instead == "an empty folder":
            other.mkdir(parents=True)
        elif instead == "another target" and where == "repository":
            repository(other.parent)
        elif instead == "another target":
            stage.target = other
            stage.run("full").check()
            stage.target = place

        def replace() -> None:
            place.rename(aside)
            if instead != "nothing":
                other.rename(place)

        before = None if instead == "nothing" else names(other)
        assert_given_up(stage, run_with(stage, replace))
        if before is None:
            assert not place.exists()
        else:
            assert names(place) == before
            place.rename(other)
        aside.rename(place)
        stage.make_good("inc")


def test_a_folder_that_is_gone_before_the_run_begins(tmp_path: Path) -> None:
    """As one whose file system is not mounted: the VM's change bitmaps tell that it was there."""
    with scene(tmp_path, "directory") as stage:
        make_target(stage, "directory", tmp_path / "place")
        place, aside = stage.target, tmp_path / "aside"
        place.rename(aside)
        place.mkdir()
        for dry in ((), ("--dry-run",)):
            result = stage.run("auto", *dry).check(STORAGE)
            assert "is mounted" in result.err
            assert [*place.iterdir()] == []
        stage.run("inc").check(4)
        place.rename(tmp_path / "empty")
        aside.rename(place)
        stage.make_good("inc")
        stage.write()
        place.rename(aside)
        stage.run("full").check()
        stage.make_good("auto")


def names(folder: Path) -> set[str]:
    """All that is in a folder, without locks, which come and go."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if not name.startswith((".lock", "locks/"))}


@pytest.mark.parametrize("kind", ["rest", "s3"])
@pytest.mark.parametrize("instead", ["nothing", "another repository"])
def test_a_server_that_serves_something_else(tmp_path: Path, kind: str, instead: str) -> None:
    with scene(tmp_path, "repository") as stage:
        other = repository(tmp_path / "other")
        config = (Path(other.location) / "config").read_bytes()
        with RestServer(tmp_path / "served") if kind == "rest" else s3_server() as server:
            url = server if isinstance(server, str) else server.url
            place = f"s3:{url}/{BUCKET}/here" if kind == "s3" else f"rest:{url}/"
            stage.repository = made(Repository(place, tmp_path / "caches", variables=KEYS))
            stage.run("full").check()
            stage.write()
            change = exchange(place)
            kept: list[bytes] = []

            def replace() -> None:
                kept.append(change(config if instead != "nothing" else b""))

            result = run_with(stage, replace)
            assert_given_up(stage, result)
            assert "has gone away" in result.err
            change(kept[0])
            stage.make_good("inc")


Exchange = Callable[[bytes], bytes]
"""Puts something else in the place of a config, or nothing; gives what was there."""


def exchange(place: str) -> Exchange:
    def change(new: bytes) -> bytes:
        with connect(place, KEYS) as storage:
            try:
                old = storage.load(CONFIG)
                storage.remove(CONFIG)
            except Missing:
                old = b""
            if new:
                storage.save(CONFIG, [new])
            return old

    return change
