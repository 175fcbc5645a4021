# SPDX-License-Identifier: Apache-2.0
"""How the source is laid out: one word for one thing, and no file that holds two."""

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src" / "qmpbackup"

OF_EACH_USE_CASE: Final = {"Request", "Outcome"}

LONGEST: Final = 400
ABOVE: Final = "Above 400 lines"
"""With this a module's docstring begins the reason why it is one file all the same."""


def modules() -> Iterator[Path]:
    """The files of the source."""
    return SOURCE.rglob("*.py")


def named(path: Path) -> str:
    """The module that a file is."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def used(path: Path, known: Collection[str]) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inner = (f"{node.module}.{each.name}" for each in node.names)
            yield from (each if each in known else str(node.module) for each in inner)


def test_no_public_class_name_stands_twice() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(SOURCE)))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice.keys() - OF_EACH_USE_CASE, twice


def test_the_command_line_builds_no_document() -> None:
    for path in (SOURCE / "cli").glob("*.py"):
        assert '"schema"' not in path.read_text(), path


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_laboratory_knows_nothing_of_the_product() -> None:
    for path in (TESTS / "lab").rglob("*.py"):
        packages = {module.partition(".")[0] for module in imported(path)}
        assert not packages & {"qmpbackup", "stock"}, path


def test_each_file_says_under_which_licence_it_is() -> None:
    folders = ("src", "tests", "scripts", "bench")
    for path in (each for name in folders for each in (TESTS.parent / name).rglob("*.py")):
        first = path.read_text().partition("\n")[0]
        assert first == "# SPDX-License-Identifier: Apache-2.0", path


def test_no_module_is_long_without_a_reason_at_its_top() -> None:
    for path in modules():
        text = path.read_text()
        if text.count("\n") > LONGEST:
            assert ABOVE in (ast.get_docstring(ast.parse(text)) or ""), path


def test_no_circle_between_files() -> None:
    files = {named(path): path for path in modules()}
    left = {name: set(used(path, files)) - {name} for name, path in files.items()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    while free := left.keys() - set().union(*left.values(), ()):
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left
