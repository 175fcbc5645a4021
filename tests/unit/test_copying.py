# SPDX-License-Identifier: Apache-2.0
"""Archives of a stranger's, and copying them to this host."""

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpbackup.errors import QmpBackupError, StorageError, UsageError, VmError
from qmpbackup.plan.guest_files import GuestFileSystem
from qmpbackup.service.files import archives, copying
from qmpbackup.service.files.copying import Wishes, copy, stays_inside
from qmpbackup.service.files.reading import Place

SYSTEM = GuestFileSystem("vda:part1", "vda1", "ext4", 1)
TREE = Wishes(recursive=True)
TOP = ("./", tarfile.DIRTYPE, b"")


def archive(*members: tuple[str, bytes, bytes], **attributes: object) -> bytes:
    """An archive of members (name, type, data or target), as another program writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime = kind, 0o755, 1000
            for key, value in attributes.items():
                setattr(info, key, value)
            if kind == tarfile.REGTYPE:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.linkname = data.decode()
                tar.addfile(info)
    return file.getvalue()


def pieces(data: bytes, size: int = 700) -> Iterator[bytes]:
    """It comes in pieces of any length."""
    return (data[at : at + size] for at in range(0, len(data), size))


def copied(data: bytes, destination: Path, wishes: Wishes = TREE, path: str = "/tree") -> int:
    """Copy an archive as that of a path in a point."""
    return copy(pieces(data), Place(SYSTEM, path), destination, wishes)


def test_a_tree_is_copied_with_modes_times_and_links(tmp_path: Path) -> None:
    data = archive(
        TOP,
        ("./a/", tarfile.DIRTYPE, b""),
        ("./a/file", tarfile.REGTYPE, b"x" * 5000),
        ("./a/same", tarfile.LNKTYPE, b"./a/file"),
        ("./a/up", tarfile.SYMTYPE, b"../b"),
        ("./b", tarfile.REGTYPE, b""),
        ("./" + "n" * 200, tarfile.REGTYPE, b"1"),
    )
    assert copied(data, tmp_path / "out") == 0
    out = tmp_path / "out"
    assert (out / "a/file").read_bytes() == b"x" * 5000
    assert (out / "a/file").stat().st_ino == (out / "a/same").stat().st_ino
    assert (out / "a/up").resolve() == out / "b"
    assert (out / ("n" * 200)).read_bytes() == b"1"
    for each in (out, out / "a", out / "a/file"):
        assert each.stat().st_mtime == 1000
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_file_gets_a_new_name_or_goes_into_a_folder(tmp_path: Path) -> None:
    data = archive(("./real", tarfile.REGTYPE, b"data"))
    copied(data, tmp_path / "new", Wishes(), path="/etc/link")
    copied(data, tmp_path, Wishes(), path="/etc/link")
    assert (tmp_path / "new").read_bytes() == (tmp_path / "link").read_bytes() == b"data"
    copied(archive(TOP), tmp_path, path="/")
    assert (tmp_path / "vda:part1").is_dir()
    copied(archive(TOP), tmp_path / "vda:part1", path="/etc/..")
    assert len(list((tmp_path / "vda:part1").iterdir())) == 1


def test_nothing_that_is_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    data = archive(("./x", tarfile.REGTYPE, b"theirs"))
    for name in ("mine", "dangling"):
        with pytest.raises(UsageError, match="is there"):
            copied(data, tmp_path / name, Wishes())
    with pytest.raises(UsageError, match="no folder"):
        copied(data, tmp_path / "none" / "x", Wishes())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dangling", "mine"]


def test_what_could_harm_this_host_is_left_out(tmp_path: Path) -> None:
    data = archive(
        TOP,
        ("./null", tarfile.CHRTYPE, b""),
        ("./disk", tarfile.BLKTYPE, b""),
        ("./pipe", tarfile.FIFOTYPE, b""),
        ("./passwd", tarfile.SYMTYPE, b"/etc/passwd"),
        ("./up", tarfile.SYMTYPE, b".."),
        ("./here", tarfile.SYMTYPE, b"."),
        ("./trick", tarfile.SYMTYPE, b"here/here/../.."),
        ("./to-link", tarfile.LNKTYPE, b"./here"),
        ("./suid", tarfile.REGTYPE, b"#!"),
        mode=0o6777,
    )
    assert copied(data, tmp_path / "out") == 7
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["here", "suid"]
    assert not (tmp_path / "out/suid").stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH)
    assert copied(data, tmp_path / "all", Wishes(recursive=True, links=True)) == 4
    assert (tmp_path / "all/passwd").readlink() == Path("/etc/passwd")


@pytest.mark.parametrize(
    "member",
    [
        ("../evil", tarfile.REGTYPE, b"x"),
        ("/tmp/evil", tarfile.REGTYPE, b"x"),
        ("./a/../../evil", tarfile.REGTYPE, b"x"),
        ("./x", tarfile.LNKTYPE, b"../../evil"),
        ("./x", tarfile.LNKTYPE, b"/etc/passwd"),
        ("./sub/new", tarfile.REGTYPE, b"x"),  # whose folder is a link
        ("./sub", tarfile.REGTYPE, b"x"),  # which is there already
    ],
    ids=lambda member: str(member[0]),
)
def test_paths_that_lead_elsewhere_end_it_and_nothing_is_left(
    tmp_path: Path, member: tuple[str, bytes, bytes]
) -> None:
    (tmp_path / "victim").mkdir()
    data = archive(TOP, ("./sub", tarfile.SYMTYPE, str(tmp_path / "victim").encode()), member)
    with pytest.raises(QmpBackupError):
        copied(data, tmp_path / "out", Wishes(recursive=True, links=True))
    assert [each.name for each in tmp_path.rglob("*")] == ["victim"]


@pytest.mark.parametrize(
    ("target", "depth", "inside"),
    [
        (b"a", 0, True),
        (b"..", 0, False),
        (b"../a", 1, True),
        (b"../..", 1, False),
        (b"a/..", 3, False),
        (b"/a", 3, False),
        (b"./../a", 1, True),
    ],
)
def test_links_that_stay_inside(target: bytes, depth: int, inside: bool) -> None:
    assert stays_inside(target, depth) is inside


def test_a_folder_must_be_asked_for_and_root_for_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="-r"):
        copied(archive(TOP), tmp_path / "out", Wishes())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="root"):
        copied(archive(TOP), tmp_path / "out", Wishes(recursive=True, preserve=True))
    assert not list(tmp_path.iterdir())


def test_the_reserve_is_kept(tmp_path: Path) -> None:
    data = archive(("./x", tarfile.REGTYPE, b"x"))
    with pytest.raises(StorageError, match="room"):
        copied(data, tmp_path / "out", Wishes(reserve=2**62))
    assert not list(tmp_path.iterdir())
    copied(data, tmp_path / "out", Wishes(reserve=0))


def test_folders_that_lie_too_deep_are_left_out_and_a_failed_copy_leaves_none(
    tmp_path: Path,
) -> None:
    deep = copying._DEEPEST + 100
    data = archive(TOP, *(("./" + "d/" * each, tarfile.DIRTYPE, b"") for each in range(1, deep)))
    assert copied(data, tmp_path / "out") == 100
    copying._remove(tmp_path / "out")
    with pytest.raises(VmError):
        copied(data[:-20000], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_removed_may_be_deeper_than_any_path_is_long(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("folder", 0o700, dir_fd=fd)
        below = os.open("folder", os.O_RDONLY, dir_fd=fd)
        os.symlink("/etc", "link", dir_fd=below)
        os.close(fd)
        fd = below
    os.close(fd)
    copying._remove(top)
    assert not top.exists()


def test_what_a_killed_copy_left_is_removed_by_the_next(tmp_path: Path) -> None:
    data = archive(TOP, ("./x", tarfile.REGTYPE, b"x"))
    with copying._beside(tmp_path / "out") as (folder, _):
        (folder / "copy").mkdir()
        (folder / "copy/closed").mkdir(mode=0)
        left = tmp_path / "left"
        folder.rename(left)
    left.rename(folder)
    copied(data, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


# Archives


def sparse(extents: str, size: int, data: bytes) -> bytes:
    """A file with holes, as GNU tar writes it."""
    text = extents.encode()
    text += b"\0" * (-len(text) % 512)
    info = tarfile.TarInfo("./GNUSparseFile.0/x")
    info.size = len(text + data)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "./x",
        "GNU.sparse.realsize": str(size),
    }
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(text + data))
    return file.getvalue()


def test_holes_are_kept(tmp_path: Path) -> None:
    far = 2**40
    data = sparse(f"2\n1000\n4\n{far}\n3\n", far + 5000, b"DATAend")
    copied(data, tmp_path / "out", Wishes())
    with (tmp_path / "out").open("rb") as file:
        assert file.read(1008)[999:] == b"\0DATA\0\0\0\0"
        file.seek(far)
        assert file.read(10) == b"end" + b"\0" * 7
    assert (tmp_path / "out").stat().st_size == far + 5000


@pytest.mark.parametrize(
    ("extents", "size"),
    [
        ("1\n0\n8\n", 100),
        ("1\n98\n7\n", 100),
        ("2\n9\n4\n0\n3\n", 100),
        ("1\n-5\n7\n", 100),
        ("9999999\n", 100),
        ("1\n0\n", 100),
    ],
)
def test_holes_that_cannot_be_are_not_believed(tmp_path: Path, extents: str, size: int) -> None:
    with pytest.raises(VmError):
        copied(sparse(extents, size, b"DATAend"), tmp_path / "out", Wishes())
    assert not list(tmp_path.iterdir())


def test_an_archive_that_is_handed_on_is_the_same_one() -> None:
    link = ("./" + "b" * 300, tarfile.SYMTYPE, b"a")
    plain = archive(TOP, ("./a", tarfile.REGTYPE, b"x" * 1000), link)
    for whole in (plain, sparse("1\n0\n7\n", 9, b"DATAend")):
        handed_on = b"".join(archives.checked(pieces(whole)))
        assert handed_on == whole[: len(handed_on)]
        assert not whole[len(handed_on) :].strip(b"\0")


def test_every_changed_byte_of_a_header_is_found_and_so_is_an_early_end() -> None:
    whole = archive(("./a", tarfile.REGTYPE, b"x" * 600))
    for at in range(512):
        changed = bytearray(whole)
        changed[at] ^= 0x55
        with pytest.raises(VmError):
            b"".join(archives.checked(pieces(bytes(changed))))
    for cut in (0, 511, 512, 700, 1535):
        with pytest.raises(VmError):
            b"".join(archives.checked(pieces(whole[:cut])))


@pytest.mark.parametrize(
    "records",
    [
        b"5 a=\n",
        b"99 path=x\n",
        b"x path=y\n",
        b"0 path=x\n",
        b"10 path=x",
        b"8 novalue\n",
        b"12 size=-1x\n",
    ],
)
def test_records_that_cannot_be_are_not_believed(records: bytes) -> None:
    info = tarfile.TarInfo("./x")
    head = tarfile.TarInfo("./PaxHeaders/x")
    head.type, head.size = b"x", len(records)
    body = records + b"\0" * (-len(records) % 512)
    data = head.tobuf(tarfile.USTAR_FORMAT) + body + info.tobuf(tarfile.USTAR_FORMAT) + b"\0" * 1024
    if records == b"5 a=\n":
        assert b"".join(archives.checked(pieces(data))) == data
        return
    with pytest.raises(VmError):
        b"".join(archives.checked(pieces(data)))


def test_records_without_end_are_not_kept() -> None:
    head = tarfile.TarInfo("./x")
    head.type, head.size = b"x", 2**33 - 1
    endless = iter([head.tobuf(tarfile.USTAR_FORMAT), *([b"\0" * 65536] * 200)])
    with pytest.raises(VmError):
        next(archives.checked(endless))
    assert next(endless, None) is not None
