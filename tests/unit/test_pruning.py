# SPDX-License-Identifier: Apache-2.0
"""Steps of a pruning: whatever is kept stays restorable after each of them, and all else goes."""

import itertools
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.errors import DamagedError
from qmpbackup.model import Consistency, Level, Point, StoredDisk, VmConfig, VmIdentity
from qmpbackup.plan.pruning import MOST_LAYERS, Merge, Pruning, Removal, keep_newest, plan
from qmpbackup.plan.retention import Verdict

Parents = list[dict[str, int | None]]
"""For each point the disks that it holds, and which earlier point's file each builds on."""


def points(made: Parents) -> list[Point]:
    return [
        Point(
            f"p{number}",
            number + 1,
            datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=number),
            Level.INC,
            None,
            Consistency.CRASH,
            VmConfig(VmIdentity(name="vm"), "7.2.22"),
            tuple(
                stored(disk, number, f"p{parent}" if parent is not None else None)
                for disk, parent in disks.items()
            ),
        )
        for number, disks in enumerate(made)
    ]


def stored(disk: str, number: int, parent: str | None) -> StoredDisk:
    level = Level.INC if parent else Level.FULL
    return StoredDisk(disk, level, f"{disk}/{level}-{number}", parent, 1, 1, "blake3:")


def pruned(
    made: Parents, kept: set[int], held: dict[str, str] | None = None, merging: bool = True
) -> Pruning:
    found = points(made)
    verdicts = [
        Verdict(each, ("asked",) if number in kept else ()) for number, each in enumerate(found)
    ]
    return plan(found, verdicts[::-1], held or {}, merging=merging)


class Model:
    """A target that carries out steps as the real one does, and refuses what it would refuse."""

    def __init__(self, made: Parents) -> None:
        self.parents = {
            f"p{number}": {
                disk: None if parent is None else f"p{parent}" for disk, parent in disks.items()
            }
            for number, disks in enumerate(made)
        }

    def children(self, point: str, disk: str) -> list[str]:
        return [each for each, disks in self.parents.items() if disks.get(disk) == point]

    def remove(self, point: str) -> None:
        assert not any(self.children(point, disk) for disk in self.parents[point])
        del self.parents[point]

    def merge(self, disk: str, chain: tuple[str, ...]) -> None:
        for below, above in itertools.pairwise(chain):
            assert self.parents[above][disk] == below
            assert self.children(below, disk) == [above]
        bottom = self.parents[chain[0]][disk]
        assert len(chain) > 1
        assert bottom is None or len(chain) <= MOST_LAYERS
        for each in chain[:-1]:
            del self.parents[each][disk]
            if not self.parents[each]:
                del self.parents[each]
        self.parents[chain[-1]][disk] = bottom

    def carry_out(self, found: Pruning) -> None:
        for step in found.steps:
            if isinstance(step, Removal):
                self.remove(step.point)
            else:
                self.merge(step.disk, step.points)


@st.composite
def targets(draw: st.DrawFn) -> Parents:
    """Chains and branches of up to three disks, not all of them in each point."""
    made: Parents = []
    for number in range(draw(st.integers(1, 14))):
        names = draw(st.sets(st.sampled_from("abc"), min_size=1))
        disks: dict[str, int | None] = {}
        for name in sorted(names):
            earlier = [each for each in range(number) if name in made[each]]
            # Mostly the last one, as incrementals do.
            choices = [None, *earlier, *earlier[-1:] * 8]
            disks[name] = draw(st.sampled_from(choices))
        made.append(disks)
    return made


@given(targets(), st.sets(st.integers(0, 13)), st.booleans())
def test_what_goes_is_gone_and_what_stays_is_whole(
    made: Parents, kept: set[int], merging: bool
) -> None:
    found = pruned(made, kept, merging=merging)
    model = Model(made)
    model.carry_out(found)
    assert set(model.parents) == {each.point.id for each in found.kept}
    for number, disks in enumerate(made):
        if f"p{number}" in model.parents:
            assert model.parents[f"p{number}"].keys() == disks.keys()
    for parents in model.parents.values():
        assert all(parent is None or parent in model.parents for parent in parents.values())
    if not merging:
        assert not any(isinstance(step, Merge) for step in found.steps)


@given(targets(), st.sets(st.integers(0, 13)))
def test_only_branches_stay_that_nobody_asked_for(made: Parents, kept: set[int]) -> None:
    found = pruned(made, kept)
    model = Model(made)
    model.carry_out(found)
    for verdict in found.kept:
        if verdict.reasons != ("asked",):
            built = Counter(
                disk
                for parents in model.parents.values()
                for disk, parent in parents.items()
                if parent == verdict.point.id
            )
            assert max(built.values()) > 1, verdict


def test_a_long_part_in_the_middle_is_merged_bit_by_bit() -> None:
    made: Parents = [{"a": number - 1 if number else None} for number in range(200)]
    found = pruned(made, {0, 199})
    assert [len(step.points) for step in found.steps if isinstance(step, Merge)] == [
        *[MOST_LAYERS] * 4,
        11,
    ]
    model = Model(made)
    model.carry_out(found)
    assert model.parents == {"p0": {"a": None}, "p199": {"a": "p0"}}


def test_what_is_held_stays_with_the_reason() -> None:
    found = pruned([{"a": None}, {"a": 0}, {"a": 1}], {2}, {"p1": "somebody needs it"})
    assert [each.reasons for each in found.verdicts] == [("asked",), ("somebody needs it",), ()]
    assert found.steps == (Merge("a", ("p0", "p1")),)


def test_the_newest_of_each_disk_but_not_a_copy() -> None:
    found = points([{"a": None, "b": None}, {"a": 0}, {"a": 1}])
    found[1] = copy_of(found[1])
    verdicts = keep_newest(found, [Verdict(each) for each in found])
    assert [each.reasons for each in verdicts] == [("newest point of b",), (), ("newest point",)]


def copy_of(point: Point) -> Point:
    return replace(point, disks=tuple(replace(each, level=Level.COPY) for each in point.disks))


def test_a_point_that_builds_on_a_missing_one_is_damage() -> None:
    with pytest.raises(DamagedError, match="p0"):
        plan(points([{"a": None}, {"a": 0}])[1:], (), {})
