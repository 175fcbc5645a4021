# SPDX-License-Identifier: Apache-2.0
"""A repository in a folder that others may reach: links in it are not followed, what is no plain file
is not opened, and folders that others could rearrange are not written into.
"""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import cli
from lab.restic import Restic
from lab.small import needs_root
from qmpbackup.errors import StorageError
from qmpbackup.restic.storage.interface import CONFIG, File, Kind, Missing, Strange
from qmpbackup.restic.storage.local import LocalStorage
from stock.stored_repository import StoredRepository

STORAGE, DAMAGED = 7, 8
NOBODY = 65534
NAME = "ab" * 32
KINDS = [kind for kind in Kind if kind is not Kind.CONFIG]


def folder_of(kind: Kind) -> str:
    """Where a file of the name `NAME` lies."""
    return f"data/{NAME[:2]}" if kind is Kind.DATA else str(kind)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty repository's folder with a config."""
    place = tmp_path / "repository"
    storage = LocalStorage(place)
    storage.create()
    storage.save(CONFIG, [b"config"])
    return place


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", ["the folder", "the one above"])
def test_folders_that_are_links_are_not_followed(place: Path, kind: Kind, depth: str) -> None:
    if depth == "the one above" and kind is not Kind.DATA:
        pytest.skip("there is one folder only")
    link = place / (folder_of(kind) if depth == "the folder" else kind)
    elsewhere = place.parent / "elsewhere"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    inside = elsewhere / NAME if depth == "the folder" else elsewhere / NAME[:2] / NAME
    inside.write_bytes(b"precious")
    storage, file = LocalStorage(place), File(kind, NAME)
    asked: list[Callable[[], object]] = [
        lambda: storage.save(file, [b"new"]),
        lambda: storage.save(File(kind, "ab" + "0" * 62), [b"new"]),
        lambda: storage.load(file),
        lambda: storage.load(file, 1, 2),
        lambda: storage.size(file),
        lambda: [*storage.list(kind)],
        lambda: storage.remove(file),
        storage.require_ours,
    ]
    for ask in asked:
        with pytest.raises(Strange, match="no folder of its own"):
            ask()
    assert inside.read_bytes() == b"precious"
    assert {path for path in elsewhere.rglob("*") if path.is_file()} == {inside}


def a_link(path: Path) -> None:
    path.with_name("target").write_bytes(b"precious")
    path.symlink_to("target")


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFSOCK)  # bind(2) takes no path as long as this may be


def a_device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make devices")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero


def a_folder(path: Path) -> None:
    path.mkdir()


STRANGE = [a_link, a_link_to_nowhere, a_pipe, a_socket, a_device, a_folder]
Put = Callable[[Path], None]


@pytest.mark.parametrize("put", STRANGE)
@pytest.mark.parametrize("kind", Kind)
def test_what_is_no_plain_file_is_not_opened(place: Path, kind: Kind, put: Put) -> None:
    file = CONFIG if kind is Kind.CONFIG else File(kind, NAME)
    path = place / "config" if file is CONFIG else place / folder_of(kind) / NAME
    path.unlink(missing_ok=True)
    put(path)
    storage = LocalStorage(place)
    asked: list[Callable[[], object]] = [
        lambda: storage.load(file),
        lambda: storage.load(file, 1, 2),
        lambda: storage.size(file),
        lambda: storage.save(file, [b"new"]),
    ]
    for ask in asked:
        with pytest.raises(Strange, match="not a plain file"):
            ask()
    if file is not CONFIG:
        # Named all the same: who reads it hears why it cannot be.
        assert (NAME, 1) in [*storage.list(kind)]
    assert not (path.parent / "nowhere").exists()


def test_the_folder_is_opened_once(place: Path) -> None:
    """What takes its place meanwhile is neither read nor written."""
    storage = LocalStorage(place)
    file = File(Kind.DATA, NAME)
    storage.require_same()
    aside = place.with_name("aside")
    place.rename(aside)
    with pytest.raises(StorageError, match="has gone away"):
        storage.require_same()
    place.mkdir()
    with pytest.raises(StorageError, match="something else is there"):
        storage.require_same()
    storage.save(file, [b"new"])
    assert storage.load(file) == b"new"
    assert [*place.iterdir()] == []
    assert (aside / folder_of(Kind.DATA) / NAME).read_bytes() == b"new"
    place.rmdir()
    aside.rename(place)
    storage.require_same()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_folder_is_made_beside_a_config_only(place: Path, kind: Kind) -> None:
    """Copies may lack folders in which nothing was; what has no config is no repository."""
    folder = place / folder_of(kind)
    folder.rmdir()
    storage, file = LocalStorage(place), File(kind, NAME)
    (place / "config").rename(place / "aside")
    with pytest.raises(Missing):
        storage.save(file, [b"new"])
    assert not folder.exists()
    (place / "aside").rename(place / "config")
    storage.save(file, [b"new"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("umask", ["000", "022", "077"])
def test_all_that_is_made_is_for_its_owner_alone(tmp_path: Path, umask: str) -> None:
    place = tmp_path / "above" / "repository"
    program = (
        "import os, sys; from pathlib import Path\n"
        "from qmpbackup.restic.storage.interface import CONFIG\n"
        "from qmpbackup.restic.storage.local import LocalStorage\n"
        "os.umask(int(sys.argv[1], 8)); storage = LocalStorage(Path(sys.argv[2]))\n"
        "storage.create(); storage.save(CONFIG, [b'config'])\n"
    )
    subprocess.run([sys.executable, "-c", program, umask, str(place)], check=True)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (place.parent, place)}
    modes |= {path: stat.S_IMODE(path.stat().st_mode) for path in place.rglob("*")}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in modes}


@pytest.mark.parametrize("where", [".", "data", "data/ab", "snapshots", "locks", "keys", "index"])
@pytest.mark.parametrize("mode", [0o777, 0o775])
@needs_root
def test_folders_that_others_could_rearrange_are_refused(
    place: Path, where: str, mode: int
) -> None:
    folder = place / where
    os.chown(folder, 0, NOBODY)
    LocalStorage(place).require_ours()
    folder.chmod(mode)
    with pytest.raises(StorageError, match="may write into") as raised:
        LocalStorage(place).require_ours()
    assert str(folder) in raised.value.message
    folder.chmod(0o755)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(StorageError, match="another user"):
        LocalStorage(place).require_ours()


@needs_root
def test_no_repository_is_made_in_a_folder_of_others(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    with pytest.raises(StorageError, match="Everybody may write"):
        LocalStorage(theirs).create()
    assert [*theirs.iterdir()] == []


@pytest.fixture
def stored(tmp_path: Path) -> StoredRepository:
    """A repository with two points."""
    made = StoredRepository(tmp_path)
    for number in range(2):
        made.add({"vda": bytes([number + 1]) * 3000})
    return made


@pytest.mark.parametrize("kind", ["config", "keys", "index", "snapshots", "locks", "data"])
@pytest.mark.parametrize("put", [a_pipe, a_link_to_nowhere])
def test_commands_end_with_a_sentence(stored: StoredRepository, kind: str, put: Put) -> None:
    """Nothing waits for a pipe whose other end nobody holds."""
    places = {"config": [stored.path / "config"], "locks": [stored.path / "locks" / NAME]}
    path = (places.get(kind) or stored.files(kind))[0]
    path.unlink(missing_ok=True)
    put(path)
    environment = {**stored.made.environment, "RESTIC_CACHE_DIR": str(stored.folder / "new-cache")}
    for command in (["list"], ["verify"], ["restore", "--output", stored.folder / "out"]):
        result = cli.run(*command, "--target", str(stored.made), env=environment)
        assert result.code in {STORAGE, DAMAGED}, str(result)
        assert "Traceback" not in result.err
        if command != ["restore", "--output", stored.folder / "out"]:  # which knows no latest point
            assert path.name in result.err + result.out, str(result)


def test_a_repository_behind_a_link_is_one(stored: StoredRepository, tmp_path: Path) -> None:
    """Links on the way to it are the user's own."""
    link = tmp_path / "link"
    link.symlink_to(stored.path)
    cli.run("verify", "--target", f"restic:{link}", env=stored.made.environment).check()
    Restic(link, tmp_path / "restic-cache")("check")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_was_there_is_not_made_anew(place: Path, kind: Kind) -> None:
    """What was in it has gone away, and so has all that builds on it."""
    storage = LocalStorage(place)
    storage.require_same()
    folder = place / kind
    folder.rename(place.with_name("aside"))
    with pytest.raises(StorageError) as raised:
        storage.save(File(kind, NAME), [b"new"])
    assert "still there" in raised.value.hint
    with pytest.raises(StorageError, match=f"no folder {kind}"):
        storage.require_same()
    assert not folder.exists()
