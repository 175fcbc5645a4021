# SPDX-License-Identifier: Apache-2.0
"""The documentation names what there is: options, tests, pages."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpbackup import errors
from stock.parsers import PARSERS, actions

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All long options of a parser and of its commands, and the commands."""
    for action in actions(parser):
        yield from (name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices


def test_every_command_and_option_is_described() -> None:
    text = (DOCS / "reference" / "commands.md").read_text()
    names = {name for parser in PARSERS for name in options(parser)}
    assert not [name for name in sorted(names) if f"{name}" not in text]


def test_every_exit_code_is_described() -> None:
    text = (DOCS / "reference" / "exit-codes.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.QmpBackupError)}
    assert not [code for code in codes if not re.search(rf"^\| {code}\b", text, re.MULTILINE)]


def test_every_promise_names_a_test_that_exists() -> None:
    text = (DOCS / "explanation" / "promises.md").read_text()
    tests = ROOT / "tests"
    files = {path.relative_to(tests).as_posix(): path.read_text() for path in tests.rglob("*.py")}
    named = re.findall(r"`(\w+/test_\w+\.py)(?:::(\w+))?", text)
    assert len(named) > 30
    assert not [file for file, name in named if name not in files[file]]
    defined = "\n".join(files.values())
    assert not [name for name in re.findall(r"\btest_\w+\b(?!\.py)", text) if name not in defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]*)(#[^)]*)?\)", page.read_text()):
        place = page.parent / link[0] if link[0] else page
        assert place.exists(), link
        if link[1]:
            heads = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert link[1][1:] in anchors


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert not [page for page in pages if page != "README.md" and f"({page})" not in index]
