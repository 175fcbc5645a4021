# SPDX-License-Identifier: Apache-2.0
"""`--log-format json`: each message is one object on one line."""

import json
from pathlib import Path

import pytest

from qmpbackup.cli import main


def test_each_message_is_an_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none\nhere")
    arguments = ["--debug", "--log-format", "json", "list", "--target", missing]
    assert main.run(lambda: main._parser(arguments), arguments) != 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"time", "level", "message"} <= lines[0].keys()
    assert "error" in {line["level"] for line in lines}
    assert any("traceback" in line for line in lines)
