# SPDX-License-Identifier: Apache-2.0
"""`--log-format json`: each message is one object on one line."""

import json
import logging
from pathlib import Path

import pytest

from qmpbackup.cli import main
from qmpbackup.cli.json_log import JsonLines
from qmpbackup.cli.log_fields import Happening, about


def test_each_message_is_an_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none\nhere")
    arguments = ["--debug", "--log-format", "json", "list", "--target", missing]
    assert main.run(lambda: main._parser(arguments), arguments) != 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"time", "level", "message"} <= lines[0].keys()
    assert "error" in {line["level"] for line in lines}
    assert any("traceback" in line for line in lines)


def test_what_a_message_is_about_stands_beside_it() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s begins", ("web",), None)
    record.__dict__.update(about(Happening.BEGIN, vm="web", point="", exit_code=0))
    said = json.loads(JsonLines().format(record))
    assert said["message"] == "web begins"
    assert (said["event"], said["vm"], said["exit_code"]) == ("begin", "web", 0)
    assert "point" not in said
