# SPDX-License-Identifier: Apache-2.0
"""Files that a VM needs and no point holds: found again where they are kept elsewhere."""

from pathlib import Path

import pytest

from qmpbackup.machine import needed_files
from qmpbackup.model import NeededFile


def test_firmware_is_known_by_its_contents(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name, contents in (("a", b"other..."), ("b", b"firmware"), ("c", b"firmware")):
        (here / name).write_bytes(contents)
    (here / "0").symlink_to(here / "nothing")
    seen = needed_files.look(here / "b")
    folders = (tmp_path / "none", here)
    gone = NeededFile("/old/CODE.fd", seen.size, seen.digest)
    assert dict(needed_files.moved([gone], folders)) == {"/old/CODE.fd": str(here / "b")}
    there = NeededFile(str(here / "a"), seen.size, seen.digest)  # which is said, and not replaced
    unknown = NeededFile("/old/iso", seen.size, "")
    assert dict(needed_files.moved([there, unknown], folders)) == {}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/a/CODE.fd", "/b/C"),
        ("if=pflash,file=/a/CODE.fd,readonly=on", "if=pflash,file=/b/C,readonly=on"),
        ('{"driver":"file","filename":"/a/CODE.fd"}', '{"driver":"file","filename":"/b/C"}'),
        ("file=/a/CODE.fd.old", "file=/a/CODE.fd.old"),
        ("file=/x/a/CODE.fd", "file=/x/a/CODE.fd"),
    ],
)
def test_a_command_line_with_it_elsewhere(word: str, expected: str) -> None:
    assert needed_files.found_again([word], {"/a/CODE.fd": "/b/C"}) == (expected,)
