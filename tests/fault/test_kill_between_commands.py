# SPDX-License-Identifier: Apache-2.0
"""The tool is killed between any two commands of a run, and nothing is lost or left behind.

The places are enumerated from a recorded run, so a new step is covered by being there. `make test`
takes a spread of them and all around the instant; the slow tests take every one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lab.proxy import Place, Proxy
from stock.scene import KINDS, WHERE, Scene, Where, scene

DELICATE = frozenset({"stop", "transaction", "cont"})
RUNS_PER_TARGET = 8


SPREAD: list[tuple[Where, str, int]] = [
    ("directory", "full", 19),
    ("directory", "quiesced", 19),
    ("repository", "inc", 37),
]


@pytest.mark.parametrize(("where", "kind", "step"), SPREAD)
def test_killed_at_a_spread_of_places(tmp_path: Path, where: Where, kind: str, step: int) -> None:
    # What is before a command comes after the one before.
    thinning = 1 if where == "directory" else 2
    assert (
        kill_at_all(tmp_path, where, kind, lambda names: some_places(names, step)[1::thinning]) > 5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
def test_killed_everywhere(tmp_path: Path, where: Where, kind: str) -> None:
    assert kill_at_all(tmp_path, where, kind, all_places) > 60


def all_places(names: Sequence[str]) -> list[Place]:
    """Every place of a recorded run, and some more in case another takes more turns."""
    numbered = list(enumerate([*names, *["beyond"] * 5]))
    return [Place(number, when, name) for number, name in numbered for when in ("before", "after")]


def some_places(names: Sequence[str], step: int) -> list[Place]:
    """All before and after what is delicate, and every so many of the others."""
    last = len(names) - 1
    return [
        place
        for index, place in enumerate(all_places(names))
        if place.number <= last
        and (place.command in DELICATE or index % step == 0 or place.number == last)
    ]


def kill_at_all(
    folder: Path, where: Where, kind: str, choose: Callable[[Sequence[str]], list[Place]]
) -> int:
    """Kill runs of a kind at places chosen from a recorded one; return how many were killed (a run
    may take fewer turns than the recorded one and be over before)."""
    with scene(folder, where) as stage:
        stage.renew(kind)
        places = choose(run(stage, kind, lambda _proxy, _at: None))
        print(f"{kind}: killed at", *(f"{at.when} {at.number} {at.command}," for at in places))
        kills = 0
        for index, place in enumerate(places):
            if kind == "first" or index % RUNS_PER_TARGET == 0:
                stage.renew(kind)
            try:
                stage.write()
                kills += not run(stage, kind, killer(place))
                stage.make_good(kind)
            except BaseException as error:
                error.add_note(f"{kind} run killed at {place}")
                raise
    return kills


def killer(place: Place) -> Callable[[Proxy, Place], None]:
    """What kills a run when it gets to a place for the first time."""

    def hook(proxy: Proxy, at: Place) -> None:
        if not proxy.killed and (at.number, at.when) == (place.number, place.when):
            proxy.kill_client()

    return hook


def run(stage: Scene, kind: str, hook: Callable[[Proxy, Place], None]) -> list[str]:
    """A run of a kind through a proxy; the names of its commands, empty if it was killed."""
    path = stage.vm.folder / "proxy"
    with Proxy(path, stage.vm.socket, hook) as proxy:
        result = stage.run(kind, socket=path)
        if proxy.killed:
            stage.wait_for_rescue()  # which goes through the proxy, too
            return []
        result.check()
        return proxy.log
