# SPDX-License-Identifier: Apache-2.0
"""A password is read from where restic reads it, to the byte: the real restic is asked, too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qmpbackup.errors import UsageError
from qmpbackup.restic import password

TELL = """#!{python}
import sys
with open({told!r}, "ab") as file:
    file.write(repr(sys.argv[1:]).encode() + b"\\n")
print("secret")
"""

COMMANDS = [
    "PROGRAM",
    "  PROGRAM\ta\n b\r ",
    "PROGRAM 'one argument' \"and another\"",
    "PROGRAM a'b c'd",
    "PROGRAM ''",
    'PROGRAM \'say "hi"\' "it\'s"',
    r"PROGRAM a\ b c\d",
    r"PROGRAM 'a\b' 'a\'b' \'c d\'",
    r"PROGRAM 'ends with \\' next'",
    "PROGRAM $HOME * ; | & ~ #x",
    "PROGRAM \u00a0a\u2003b\u3000c \x1cd",
]
BROKEN = ["PROGRAM 'open", 'PROGRAM "open', " ", "''", "\\"]


def ask_restic(folder: Path, command: str) -> int:
    """What restic makes of a password command; it ends there, as there is no repository."""
    done = subprocess.run(
        ["restic", "--repo", str(folder / "none"), "--no-cache", "cat", "config"],
        env={**os.environ, "RESTIC_PASSWORD_COMMAND": command},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    return done.returncode


@pytest.mark.skipif(shutil.which("restic") is None, reason="restic is not installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_gets_the_arguments_that_restic_gives_it(command: str, tmp_path: Path) -> None:
    program, told = tmp_path / "program", tmp_path / "told"
    program.write_text(TELL.format(python=sys.executable, told=str(told)))
    program.chmod(0o755)
    said = command.replace("PROGRAM", str(program))
    ask_restic(tmp_path, said)
    assert password.read({"RESTIC_PASSWORD_COMMAND": said}) == "secret"
    theirs, ours = told.read_text().splitlines()
    assert ours == theirs


@pytest.mark.parametrize("command", BROKEN)
def test_what_is_no_command(command: str) -> None:
    with pytest.raises(UsageError, match="RESTIC_PASSWORD_COMMAND"):
        password.read({"RESTIC_PASSWORD_COMMAND": command})


@pytest.mark.parametrize("command", ["false", "/nowhere/program", "printf ''"])
def test_a_command_that_gives_none(command: str) -> None:
    with pytest.raises(UsageError, match="RESTIC_PASSWORD_COMMAND"):
        password.read({"RESTIC_PASSWORD_COMMAND": command})


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (b"secret", "secret"),
        (b"secret\n", "secret"),
        (b"\t secret with space \r\n\n", "secret with space"),
        (b"two\nlines\n", "two\nlines"),
        ("\u00a0ümläut\u2028".encode(), "ümläut"),
        (b"\x1ckept\x1f\n", "\x1ckept\x1f"),
        (b"\xef\xbb\xbfafter a mark\n", "after a mark"),
        ("\ufeffwide ü\r\n".encode("utf-16-le"), "wide ü"),
        ("\ufeffwide ü\r\n".encode("utf-16-be"), "wide ü"),
        (b"no utf-8 \xff\n", "no utf-8 \udcff"),
    ],
)
def test_a_file_holds_it_with_space_around(held: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(held)
    environment = {"RESTIC_PASSWORD_FILE": str(file), "RESTIC_PASSWORD": "another"}
    assert password.read(environment) == expected


def test_a_variable_holds_it_as_it_is() -> None:
    assert password.read({"RESTIC_PASSWORD": " as it is\n"}) == " as it is\n"


def test_an_empty_file_holds_none(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(b" \n")
    with pytest.raises(UsageError, match="empty"):
        password.read({"RESTIC_PASSWORD_FILE": str(tmp_path / "password")})


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        password.read({"RESTIC_PASSWORD_FILE": str(tmp_path / "none")})


def test_both_are_one_too_many(tmp_path: Path) -> None:
    both = {"RESTIC_PASSWORD_FILE": str(tmp_path), "RESTIC_PASSWORD_COMMAND": "true"}
    with pytest.raises(UsageError, match="Both"):
        password.read(both)
