# SPDX-License-Identifier: Apache-2.0
"""The real `restic forget` and our policies keep the same of the same times, for the same reasons.

With the restic of PATH; `scripts/test-versions.sh` runs the same with the one of a newer Debian.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lab.restic import PASSWORD, Restic
from qmpbackup.errors import UsageError
from qmpbackup.model import Consistency, Level, Point, VmConfig, VmIdentity
from qmpbackup.plan.retention import UNLIMITED, Duration, Policy, Verdict, decide
from qmpbackup.restic.keyfile import Scrypt
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.snapshot import Snapshot
from qmpbackup.restic.storage.local import LocalStorage

NEWEST = datetime(2024, 3, 31, 23, 30, tzinfo=UTC)
"""A month's last day: going back a month leads to a day that the month may not have."""

SPANS = {
    "quarters": 15 * 60,
    "hours": 7 * 3600,
    "days": 40 * 3600,
    "months": 20 * 86400,
    "years": 200 * 86400,
}
"""Groups of snapshots (hosts, to restic) and about how many seconds lie between two."""

TAGS = ("a", "b", "c")
COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


class Stage:
    """A repository with snapshots of several hosts, and the same as points."""

    def __init__(
        self, restic: Restic, groups: dict[str, list[Point]], tags: dict[str, tuple[str, ...]]
    ) -> None:
        self.restic = restic
        self.groups = groups
        self.tags = tags


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("retention")
    chance = random.Random(20261123)  # noqa: S311 - the same times in each run
    groups: dict[str, list[Point]] = defaultdict(list)
    tags: dict[str, tuple[str, ...]] = {}
    storage = LocalStorage(folder / "repository")
    with Repository.create(storage, PASSWORD, cost=Scrypt(2, 1, 1), environment={}) as made:
        for host, gap in SPANS.items():
            for time in times(chance, gap):
                found = tuple(tag for tag in TAGS if chance.random() < 0.2)
                snapshot = Snapshot(time, bytes(32), (f"/{host}",), hostname=host, tags=found)
                name = made.save_snapshot(snapshot)
                groups[host].append(point(name, time))
                tags[name] = found
    yield Stage(Restic(folder / "repository", folder / "cache"), groups, tags)


def times(chance: random.Random, gap: int) -> list[datetime]:
    """Different times, in no order; one lies in the future."""
    moment = NEWEST
    found = [datetime.now(UTC) + timedelta(days=3)]
    for _ in range(14):
        found.append(moment)
        moment -= timedelta(
            seconds=chance.randint(1, 2 * gap), microseconds=chance.randint(0, 999999)
        )
    chance.shuffle(found)
    return found


def point(name: str, time: datetime) -> Point:
    vm = VmConfig(VmIdentity(name="vm"), "7.2.22")
    return Point(name, 1, time, Level.FULL, None, Consistency.CRASH, vm, ())


counts = st.one_of(st.just(0), st.integers(0, 9), st.just(UNLIMITED))
durations = st.builds(
    Duration, st.integers(0, 2), st.integers(0, 13), st.integers(0, 40), st.integers(0, 60)
)
tag_lists = st.lists(
    st.lists(st.sampled_from(("", *TAGS)), min_size=1, max_size=2).map(tuple), max_size=2
)
policies = st.builds(
    Policy,
    *[counts] * len(COUNTS),
    within=st.one_of(st.just(Duration()), durations),
    tags=st.one_of(st.just(()), tag_lists.map(tuple)),
)


def options(policy: Policy, unlimited: str) -> list[str]:
    """A policy in restic's words."""
    found = []
    for name in COUNTS:
        count = getattr(policy, name)
        if count:
            found.append(f"--keep-{name}={unlimited if count == UNLIMITED else count}")
    if policy.within:
        found.append(f"--keep-within={policy.within}")
    return [*found, *(f"--keep-tag={','.join(tags)}" for tags in policy.tags)]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(policy=policies)
def test_the_same_policy_keeps_the_same(stage: Stage, policy: Policy) -> None:
    assume(policy)
    version = stage.restic.version
    if version < (0, 16):  # which knew no counts without end
        counts = {name: abs(getattr(policy, name)) for name in COUNTS}
        policy = replace(policy, **counts)
    ours = {host: verdicts(stage, host, policy) for host in stage.groups}
    command = ("forget", "--dry-run", "--json", "--group-by=host", *options(policy, "unlimited"))
    theirs = stage.restic(*command, check=False)
    if version >= (0, 17) and not all(ours.values()):
        assert theirs.code == 1
        assert "refusing to delete last snapshot" in theirs.err
        return
    found = {group["host"]: group for group in theirs.json}
    assert found.keys() == ours.keys()
    for host, group in found.items():
        found_reasons = (each["matches"] for each in group["reasons"] or [])
        kept = {
            each["id"]: why for each, why in zip(group["keep"] or [], found_reasons, strict=True)
        }
        if version >= (0, 16):
            assert {name: plain(why) for name, why in kept.items()} == reasons(ours[host])
        else:  # nor did it keep the oldest
            assert set(kept) == {
                each.point.id
                for each in ours[host]
                if any(not reason.startswith("oldest ") for reason in each.reasons)
            }


def verdicts(stage: Stage, host: str, policy: Policy) -> tuple[Verdict, ...]:
    try:
        return decide(stage.groups[host], policy, datetime.now(UTC), stage.tags)
    except UsageError:
        return ()


def reasons(found: tuple[Verdict, ...]) -> dict[str, set[str]]:
    return {each.point.id: set(plain(each.reasons)) for each in found if each.kept}


def plain(found: list[str] | tuple[str, ...]) -> set[str]:
    """Reasons in the words of both."""
    return {
        each.removeprefix("oldest ")
        .removesuffix(" snapshot")
        .replace("[", "")
        .replace("]", "")
        .replace(", ", ",")
        for each in found
    }
