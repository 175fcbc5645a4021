# SPDX-License-Identifier: Apache-2.0
"""How fast is copied, in bytes a second. 0 is no limit, and a share of a limit is never 0.

A limit may change while something is copied, so it is asked for again and again: a `Speed`. Must not
know where it comes from, nor what is copied.
"""

from collections.abc import Callable

Speed = Callable[[], int]


def unlimited() -> int:
    """No limit."""
    return 0


def shared(limit: int, among: int) -> int:
    """The part of each of so many."""
    return max(1, limit // max(1, among)) if limit else 0


def lower(one: int, other: int) -> int:
    """What holds where two limits do."""
    return min(one, other) if one and other else one or other


class JobSpeeds:
    """How fast jobs of one run go: each at most as fast as `speed`, and all of them as fast as `limit`,
    which those that still run have among them."""

    def __init__(self, speed: int, limit: Speed, jobs: int) -> None:
        self._speed = speed
        self._limit = limit
        self.each = self._of(jobs)
        """What each has been told."""

    def changed(self, running: int) -> bool:
        """Whether each of so many is to be told something else now."""
        before, self.each = self.each, self._of(running)
        return self.each != before

    def _of(self, jobs: int) -> int:
        return lower(self._speed, shared(self._limit(), jobs))
