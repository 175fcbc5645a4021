# SPDX-License-Identifier: Apache-2.0
"""Secrets come from where they are, as late as can be, and show nowhere."""

from pathlib import Path

import pytest

from qmpbackup.errors import UsageError
from qmpbackup.fleet.secrets import environment, file_of, reveal
from qmpbackup.fleet.settings import Secret, TargetSettings

MARK = "hunter2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Our folder of credentials."""
    (tmp_path / "offsite").write_text(f"{MARK}\n")
    return tmp_path


@pytest.fixture(autouse=True)
def outside_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials are handed over."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


def test_a_secret_is_in_a_file_or_printed_by_a_command(folder: Path) -> None:
    assert reveal(Secret(credential="offsite"), folder) == MARK
    assert reveal(Secret(file=str(folder / "offsite"))) == MARK
    assert reveal(Secret(command=("cat", str(folder / "offsite")))) == MARK


def test_what_systemd_hands_over_goes_before_our_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over = folder / "handed-over"
    handed_over.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(handed_over))
    assert file_of(Secret(credential="offsite"), folder) == folder / "offsite"
    (handed_over / "offsite").write_text("newer")
    assert reveal(Secret(credential="offsite"), folder) == "newer"


def test_a_child_is_told_where_the_password_is(folder: Path) -> None:
    key = Secret(command=("cat", str(folder / "offsite")))
    variables: dict[str, str | Secret] = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": key}
    target = TargetSettings("x", "restic:/r", Secret(credential="offsite"), variables)
    told = environment(target, folder)
    assert told == {
        "AWS_ACCESS_KEY_ID": "AK",
        "AWS_SECRET_ACCESS_KEY": MARK,
        "RESTIC_PASSWORD": "",
        "RESTIC_PASSWORD_COMMAND": "",
        "RESTIC_PASSWORD_FILE": str(folder / "offsite"),
    }
    told = environment(TargetSettings("x", "restic:/r", key), folder)
    assert (told["RESTIC_PASSWORD"], told["RESTIC_PASSWORD_FILE"]) == (MARK, "")
    assert MARK not in repr(target)


@pytest.mark.parametrize(
    ("secret", "sentence"),
    [
        (
            Secret(credential="gone"),
            "The credential gone cannot be read from .*/gone: No such file",
        ),
        (Secret(file="/nowhere/x"), "The secret in /nowhere/x cannot be read"),
        (Secret(command=("false", MARK)), "The command false for a secret failed"),
        (Secret(command=("/nowhere/x",)), "The program x is not installed"),
        (Secret(command=("true",)), "What true prints is empty"),
        (Secret(command=("printf", r"a\0b")), "is empty, too long, or no text"),
    ],
)
def test_a_secret_that_cannot_be_had_is_told_in_a_sentence(
    folder: Path, secret: Secret, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as told:
        environment(TargetSettings("x", "restic:/r", secret), folder)
    assert MARK not in str(told.value)


def test_a_command_is_not_asked_for_each_vm(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    for code in (0, 1):
        asked.write_text("")
        secret = Secret(command=("/bin/sh", "-c", f"echo x >>{asked}; echo word; exit {code}"))
        for _ in range(3):
            if code:
                with pytest.raises(UsageError, match="failed"):
                    reveal(secret)
            else:
                assert reveal(secret) == "word"
        assert asked.read_text() == "x\n"
