# SPDX-License-Identifier: Apache-2.0
"""A target of each kind, for the tests that are put to all of them."""

from pathlib import Path

import pytest

from qmpbackup.model import Point
from stock.any_target import FIRST, KINDS, SECOND, THIRD, Place


@pytest.fixture(params=KINDS, ids=lambda each: each.__name__)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A target in which nothing is yet."""
    made: Place = request.param(tmp_path, monkeypatch)
    return made


@pytest.fixture
def points(place: Place) -> list[Point]:
    """A full and two incrementals in it, of two disks."""
    made = [place.add(FIRST)]
    for writes in (SECOND, THIRD):
        made.append(place.add(writes, made[-1]))
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where something is restored to."""
    return tmp_path / "out"
