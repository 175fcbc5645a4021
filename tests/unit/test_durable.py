# SPDX-License-Identifier: Apache-2.0
"""Bytes are written to the last one, in however many parts they come."""

from pathlib import Path

from qmpbackup.durable import write_all


def test_more_parts_than_the_kernel_takes_at_once(tmp_path: Path) -> None:
    parts = [number.to_bytes(2, "big") * (number % 3) for number in range(1500)]
    with (tmp_path / "file").open("wb") as file:
        write_all(file.fileno(), [*parts[:700], *(memoryview(part) for part in parts[700:])])
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
