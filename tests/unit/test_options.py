# SPDX-License-Identifier: Apache-2.0
"""Options of all commands: what holds of each, without running one."""

import argparse
from collections.abc import Iterator

import pytest

from qmpbackup.cli.main import _parser
from qmpbackup.cli.rebase import qmprebase_parser, qmprestore_parser


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)


@pytest.mark.parametrize("parser", [_parser([]), qmprebase_parser(), qmprestore_parser()])
def test_an_option_takes_its_own_default(parser: argparse.ArgumentParser) -> None:
    """argparse reads a default that is a text as if it had been typed."""
    texts = [each for each in actions(parser) if each.type and isinstance(each.default, str)]
    for action in texts:
        assert callable(action.type)
        action.type(action.default)
