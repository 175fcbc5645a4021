# SPDX-License-Identifier: Apache-2.0
"""All command lines there are, and what stands in them."""

import argparse
from collections.abc import Iterator

from qmpbackup.cli.main import _parser
from qmpbackup.cli.original import qmprebase_parser, qmprestore_parser

PARSERS = (_parser([]), qmprebase_parser(), qmprestore_parser())


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options of a parser and of its commands, those that are not shown as well."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)
