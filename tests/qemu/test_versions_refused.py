# SPDX-License-Identifier: Apache-2.0
"""A QEMU that cannot do what we promise is refused before anything is touched."""

from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.scripted import FakeMonitor, ScriptedServer


@pytest.mark.parametrize("version", [(6, 2, 0), (7, 0, 9)])
def test_an_old_qemu_is_refused_and_asked_nothing(
    version: tuple[int, int, int], tmp_path: Path
) -> None:
    asked: list[str] = []

    def answer(name: str) -> dict[str, Any]:
        asked.append(name)
        return {"return": {}}

    with ScriptedServer(tmp_path / "qmp", FakeMonitor(answer, version).serve) as server:
        target = ("--target", tmp_path / "target")
        result = cli.run("--socket", server.path, "backup", "--level", "auto", *target).check(6)
    assert ".".join(map(str, version)) in result.err
    assert "7.1" in result.err
    assert asked == []
    assert not (tmp_path / "target").exists()
