# SPDX-License-Identifier: Apache-2.0
"""One answer of QEMU's is nonsense, at places all over a run: it ends in order, in bounded time, with
a sentence, and the next run cleans up and goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.aftermath import manifests
from lab.disks import MIB
from lab.proxy import Place, Proxy
from stock.scene import Scene, scene

PARTS = 2
"""Tests that share the places of a complete run, so that each is over in minutes."""

Spoil = Callable[[dict[str, Any]], bytes]


def value(spoilt: object) -> Spoil:
    """Another value in an answer that is well formed."""

    def spoil(answer: dict[str, Any]) -> bytes:
        return json.dumps({"return": spoilt, "id": answer.get("id")}).encode() + b"\n"

    return spoil


def line(spoilt: bytes) -> Spoil:
    """No answer at all."""
    return lambda _answer: spoilt


SPOILT: dict[str, Spoil] = {
    "a number": value(-1),
    "nothing": value(None),
    "an empty list": value([]),
    "a list of lists": value([[]]),
    "a hostile name": value([{"node-name": "../../x\n\0", "device": "../../x", "id": "\x1b[2J"}]),
    "a text": value("../../x"),
    "garbage": line(b"\x00\xfe not QMP at all\r\n"),
    "a broken line": line(b'{"return": {"x": \n'),
    "deep nesting": line(b'{"return": ' + b"[" * 100_000 + b"\n"),
    "a refusal": line(b'{"error": {"class": 7}}\n'),
    "a gigantic line": lambda _answer: b'{"return": "' + b"x" * (65 * MIB) + b'"}\n',
}


NOBODY = line(b'{"return": {}, "id": "somebody else"}\n')
"""Costs the whole time limit of a command."""


def run(stage: Scene, hook: Callable[[Proxy, Place], None]) -> cli.Result:
    path = stage.vm.folder / "proxy"
    with Proxy(path, stage.vm.socket, hook):
        return cli.run(*stage.arguments("inc", path))


def spoil_at(number: int, spoil: Spoil) -> Callable[[Proxy, Place], None]:
    def hook(proxy: Proxy, at: Place) -> None:
        if (at.number, at.when) == (number, "after"):
            proxy.answer = spoil

    return hook


def spoil_at_all(folder: Path, start: int, step: int) -> None:
    with scene(folder) as stage:
        stage.renew("inc")
        names: list[str] = []
        run(stage, lambda _proxy, at: names.append(at.command))
        kinds = list(SPOILT)
        for number in range(start, len(names) // 2, step):
            kind = kinds[(number - start) // step * 4 % len(kinds)]
            print(f"{names[2 * number]} ({number}): {kind}")
            stage.write()
            before = len(manifests(stage.target))
            result = run(stage, spoil_at(number, SPOILT[kind]))
            made = len(manifests(stage.target)) - before
            context = f"{kind} after {number} {names[2 * number]}: {result}"
            assert (result.code, made) in {(0, 1), (3, 1), (4, 0), (2, 0), (6, 0), (7, 0)}, context
            assert "Traceback" not in result.err, context
            assert "Unexpected" not in result.err, context
            assert "\x1b" not in result.err, context
            stage.make_good("inc")


def test_nonsense_at_a_spread_of_places(tmp_path: Path) -> None:
    spoil_at_all(tmp_path, 0, step=6)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_nonsense_everywhere(tmp_path: Path, part: int) -> None:
    spoil_at_all(tmp_path, part, step=PARTS)


@pytest.mark.slow
def test_an_answer_that_never_comes(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.renew("inc")
        result = run(stage, spoil_at(20, NOBODY)).check(6)
        assert "did not answer" in result.err
        stage.make_good("inc")


@pytest.mark.slow
@pytest.mark.parametrize("last", ["blockdev-create", "stop", "blockdev-backup"])
def test_a_monitor_that_answers_nothing_any_more(tmp_path: Path, last: str) -> None:
    """It costs one time limit of a command and one of all that is left, not one for each step."""
    silent: set[str] = set()

    def hook(proxy: Proxy, at: Place) -> None:
        if at.command == last:
            silent.add(last)
        if silent and at.when == "after":
            proxy.answer = NOBODY

    with scene(tmp_path) as stage:
        stage.renew("inc")
        result = run(stage, hook).check(6)
        assert "did not answer" in result.err
        stage.make_good("inc")
