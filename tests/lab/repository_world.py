# SPDX-License-Identifier: Apache-2.0
"""A world whose points lie in a repository, read with the real restic."""

from typing import Any

from lab.repositories import Repository, repository
from lab.world import Meddling, World


class RepositoryWorld(World):
    """See the module."""

    def _begin(self) -> None:
        super()._begin()
        made = repository(self.storage.path)
        caches = self._folder / "caches"
        caches.mkdir()
        self._repository = Repository(made.location, caches)

    @property
    def target(self) -> Repository:
        """Where the points go."""
        return self._repository

    def back_up(self, level: str, meddling: Meddling | None = None) -> None:
        """Run a backup. Every point is complete in itself, so there are no differentials."""
        super().back_up("inc" if level == "diff" else level, meddling)

    def _files(self) -> set[str]:
        return {each["id"] for each in self._repository.snapshots()}

    def _assert_only_named(self, points: list[dict[str, Any]]) -> None:
        assert len(points) == len(self._files())
        self._repository.assert_whole()
