# SPDX-License-Identifier: Apache-2.0
"""What QEMU says, read with distrust: numbers that no 64 bits hold, and text that is none."""

import pytest

from qmpbackup import bounded_json
from qmpbackup.errors import MonitorProtocolError
from qmpbackup.machine.reply import Reply


@pytest.mark.parametrize("value", [2**63, 10**400, -1, 1.5, float("inf"), True, None, "1"])
def test_a_number_that_is_none(value: object) -> None:
    with pytest.raises(MonitorProtocolError):
        Reply({"virtual-size": value}, "image").integer("virtual-size")


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "a\udcffb", 7, None])
def test_a_text_that_is_none(value: object) -> None:
    with pytest.raises(MonitorProtocolError):
        Reply({"name": value}, "node").text("name")


def test_a_text_of_several_lines() -> None:
    """QEMU takes it for the id of a device, and no other disk shall suffer from it."""
    assert Reply({"qdev": "a\r\nb"}, "drive").text("qdev") == "a\r\nb"


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"NaN", b"1e", b'"\xff"', b"9" * 10_000, b"[1,", b""]
)
def test_a_document_that_is_none(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        bounded_json.load(text, 1 << 30)


def test_a_document_is_refused_by_what_it_would_take() -> None:
    text = b"[" + b"[]," * 100_000 + b"0]"
    with pytest.raises(bounded_json.TooLarge):
        bounded_json.load(text, 1 << 20)
    assert len(bounded_json.load(text, 32 << 20)) == 100_001
