# SPDX-License-Identifier: Apache-2.0
"""Marks of runs, read from what QEMU says of its character devices."""

import pytest

from qmpbackup.machine.presence import among

OWN = "qmpbackup-living-00112233aabb-41-host.example"
OVER_TCP = "qmpbackup-living-00112233aabb.40001.40002-41-host"
MONITOR = "tcp:127.0.0.1:4444,server=on"


@pytest.mark.parametrize(
    ("devices", "lives"),
    [
        ([(OWN, "unix:")], True),
        ([(OWN, "unix:@x <-> @y")], True),
        ([(OWN, "disconnected:fd:qmpbackup-living")], False),
        ([(OVER_TCP, "null"), ("mon", f"{MONITOR} <-> 127.0.0.1:40001")], True),
        ([(OVER_TCP, "null"), ("mon", f"{MONITOR} <-> [::1]:40002")], True),
        ([(OVER_TCP, "null"), ("mon", f"{MONITOR} <-> 127.0.0.1:40003")], False),
        ([(OVER_TCP, "null"), ("mon", f"disconnected:{MONITOR}")], False),
    ],
)
def test_a_mark_lives_as_long_as_its_connection(
    devices: list[tuple[str, str]], lives: bool
) -> None:
    (mark,) = among(devices)
    assert mark.lives == lives
    assert (mark.pid, mark.label) == ("41", devices[0][0])


@pytest.mark.parametrize("label", ["qmpbackup-living", "x", f"x{OWN}", f"{OWN}\x1b[2J"])
def test_what_is_no_mark(label: str) -> None:
    assert among([(label, "unix:")]) == []
