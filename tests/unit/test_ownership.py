# SPDX-License-Identifier: Apache-2.0
"""Which folders count as ours alone."""

import grp
import os
from pathlib import Path

import pytest

from qmpbackup.errors import StorageError, UsageError
from qmpbackup.ownership import make_private, refuse_planted_links, require_ours

GROUP_OF_OTHERS = 65534


def look_at(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        require_ours(fd, folder)
    finally:
        os.close(fd)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o1777, 0o2750])
def test_a_folder_that_only_its_owner_may_rearrange_is_ours(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    look_at(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root's own group")
def test_the_group_may_write_where_it_is_the_owners_alone(tmp_path: Path) -> None:
    assert set(grp.getgrgid(0).gr_mem) <= {"root"}
    tmp_path.chmod(0o775)
    look_at(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("mode", [0o770, 0o2775])
def test_a_folder_that_a_group_may_write_to_is_not_ours(tmp_path: Path, mode: int) -> None:
    os.chown(tmp_path, 0, GROUP_OF_OTHERS)
    tmp_path.chmod(mode)
    with pytest.raises(StorageError, match="A group of users may write") as refused:
        look_at(tmp_path)
    assert "chmod g-w" in refused.value.hint


def test_a_folder_that_everybody_may_write_to_is_not_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StorageError, match="Everybody may write"):
        look_at(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give links away")
@pytest.mark.parametrize(
    ("mode", "owner", "planted"),
    [
        (0o1777, GROUP_OF_OTHERS, True),
        (0o1777, 0, False),
        (0o755, GROUP_OF_OTHERS, False),
    ],
)
def test_a_link_of_others_in_a_folder_open_to_all_is_planted(
    tmp_path: Path, mode: int, owner: int, planted: bool
) -> None:
    tmp_path.chmod(mode)
    link = tmp_path / "link"
    link.symlink_to("/nowhere")
    os.chown(link, owner, owner, follow_symlinks=False)
    for path in (link, link / "below", tmp_path / "other" / ".." / "link" / "below"):
        if planted:
            with pytest.raises(UsageError, match="another user has put there"):
                refuse_planted_links(path)
        else:
            refuse_planted_links(path)
    refuse_planted_links(tmp_path / "other")


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_for_us_alone_is_made_or_made_so(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "above" / "cache"
    if mode != 0o700:
        folder.mkdir(parents=True)
        folder.chmod(mode)
    make_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_where_others_may_have_put_something_nothing_is_for_us_alone(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("open", "link", "file"):
        with pytest.raises(OSError):
            make_private(tmp_path / name)
