# SPDX-License-Identifier: Apache-2.0
"""The shell on the files of a point: completion, and what a terminal is spared."""

from collections.abc import Iterator
from typing import cast

import pytest

from qmpbackup.cli.files_shell import FilesShell, _harmless
from qmpbackup.errors import NoSuchTarget
from qmpbackup.plan.guest_files import GuestFile, GuestFileSystem
from qmpbackup.service.files.reading import Place, Reading

ROOT = GuestFileSystem("vda:part1", "vda1", "ext4", 1)
FOLDERS = {
    "/": (b"etc", b"home", b"with space", b"hostile\x1b[2J", b"$(reboot)"),
    "/etc": (b"hostname", b"hosts", b"passwd"),
}


class StandIn:
    """Answers as a point with these folders."""

    systems = (ROOT,)

    def readable(self) -> list[GuestFileSystem]:
        return [ROOT]

    def place(self, address: str) -> Place:
        path = address.removeprefix("vda:part1:")
        if not path.startswith("/"):
            raise NoSuchTarget(address)
        return Place(ROOT, path)

    def is_folder(self, place: Place) -> bool:
        return place.path.rstrip("/") in {"", *FOLDERS}

    def entries(self, place: Place) -> Iterator[GuestFile]:
        for name in FOLDERS[place.path.rstrip("/") or "/"]:
            kind = "d" if f"/{name.decode()}" in FOLDERS or name == b"home" else "f"
            yield GuestFile(kind, 0o644, 0, 0, 0, 0.0, 1, name, b"")


def candidates(shell: FilesShell, text: str) -> list[str]:
    found: list[str] = []
    while (each := shell._completed(text, len(found))) is not None:
        found.append(each)
    return found


@pytest.fixture
def shell() -> FilesShell:
    return FilesShell(cast("Reading", StandIn()))


def test_at_the_top_commands_and_file_systems_are_completed(shell: FilesShell) -> None:
    assert candidates(shell, "c") == ["cd", "cat", "cp"]
    assert candidates(shell, "v") == ["vda:part1:/"]
    assert candidates(shell, "/e") == ["/etc/"]
    assert candidates(shell, "/nowhere/x") == []


def test_names_are_completed_where_one_is(shell: FilesShell) -> None:
    shell._one(["cd", "vda:part1:/"])
    assert candidates(shell, "etc/host") == ["etc/hostname", "etc/hosts"]
    assert candidates(shell, "vda:part1:/etc/p") == ["vda:part1:/etc/passwd"]
    assert candidates(shell, "h") == ["help", "home/"]


def test_what_a_terminal_or_this_line_would_obey_is_not_completed(shell: FilesShell) -> None:
    assert candidates(shell, "/") == ["/etc/", "/home/"]


def test_a_terminal_obeys_nothing_of_a_file() -> None:
    said = b"".join(_harmless([b"one\n\ttwo \x1b]0;title\x07 \xff", "ü\n".encode()]))
    assert said == b"one\n\ttwo \\x1b]0;title\\x07 \\xff" + "ü\n".encode()
