# SPDX-License-Identifier: Apache-2.0
"""A world whose points lie in a repository, read with the real restic."""

import os
from typing import Any

from lab.cli import Result
from lab.repositories import Repository
from lab.world import ELSEWHERE, Meddling, World
from stock.repositories import repository


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

    def manifests(self) -> list[dict[str, Any]]:
        """The points of this world's VM."""
        return [each for each in super().manifests() if each["vm"].get("host") != ELSEWHERE]

    @property
    def _which(self) -> tuple[str, ...]:
        return ("--vm", f"{os.uname().nodename}/world")

    def _visited(self, result: Result, files: object) -> None:
        result.check()
        prune = ("prune", "--target", str(self.target), "--vm", f"{ELSEWHERE}/world")
        self.run(*prune, "--keep-last", "1").check()
        assert self._files() == files, "a point of this VM went with those of another"

    def _files(self) -> set[str]:
        found = self._repository.snapshots()
        return {each["id"] for each in found if each["hostname"] != ELSEWHERE}

    def _assert_only_named(self, points: list[dict[str, Any]]) -> None:
        assert len(points) == len(self._files())
        self._repository.assert_whole()
