# SPDX-License-Identifier: Apache-2.0
"""Options of all commands: what holds of each, without running one."""

import argparse

import pytest

from stock.parsers import PARSERS, actions


@pytest.mark.parametrize("parser", PARSERS)
def test_an_option_takes_its_own_default(parser: argparse.ArgumentParser) -> None:
    """argparse reads a default that is a text as if it had been typed."""
    texts = [each for each in actions(parser) if each.type and isinstance(each.default, str)]
    for action in texts:
        assert callable(action.type)
        action.type(action.default)
