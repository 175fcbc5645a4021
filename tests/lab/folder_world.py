# SPDX-License-Identifier: Apache-2.0
"""A world whose points lie in a folder, where files can be damaged and chains merged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.cli import Result
from lab.rig import Trust
from lab.world import DAMAGED, DONE, USAGE, Damage, World

MARK = ".damaged"
"""What notes in the target end with that say which files are known to be damaged."""
OWN_FILES = {"vm.json", ".lock", ".lock-remove"}


class FolderWorld(World):
    """See the module."""

    @property
    def target(self) -> Path:
        """Where the points go."""
        return self.storage.path

    def _visited(self, result: Result, files: object) -> None:
        result.check(USAGE)
        assert self._files() == files, f"a refusal changed something: {result}"

    def _assert_only_named(self, points: list[dict[str, Any]]) -> None:
        named = {disk["file"] for point in points for disk in point["disks"]}
        named |= {f"points/{point['id']}.json" for point in points}
        found = {str(path.relative_to(self.target)) for path in self._paths()} - OWN_FILES
        found = {each for each in found if not each.endswith(MARK)}
        assert found <= named, f"left in the target: {found - named}"
        assert {self.target / each for each in named - found} <= set(self.damaged), named - found

    @property
    def marks(self) -> list[str]:
        """What the target says to be damaged."""
        return sorted(path.name for path in self._paths() if path.name.endswith(MARK))

    def _needed(self, point: str) -> set[Path]:
        """The files that a point is made of."""
        disks = self._stored(self.manifests())
        found = set()
        for each in [disk for known, disk in disks if known == point]:
            found |= {self.target / file for _, file in self._chain(disks, point, each)}
        return found

    def _chain(
        self, disks: Mapping[tuple[str, str], Any], point: str, disk: str
    ) -> list[tuple[str, str]]:
        """Points and files that a disk of a point builds on, and its own first."""
        links = []
        at: str | None = point
        while at is not None:
            stored = disks[at, disk]
            links.append((at, str(stored["file"])))
            at = stored["parent"]
        return links

    def damage(self, file: int, how: Damage, at: int) -> None:
        """Damage one of the stored files."""
        files = sorted(path for path in self._stored_files() if path not in self.damaged)
        if not files:
            return
        path = files[file % len(files)]
        data = path.read_bytes()
        self.damaged[path] = data
        self._trust[path.parent.name] = Trust()
        if how == "remove":
            path.unlink()
        elif how == "truncate":
            path.write_bytes(data[: at % len(data)])
        else:
            at %= len(data)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])

    def _stored_files(self) -> set[Path]:
        return {self.target / disk["file"] for point in self.manifests() for disk in point["disks"]}

    def repair(self) -> None:
        """Put all damaged files back."""
        for path, data in self.damaged.items():
            path.write_bytes(data)
        self.damaged.clear()

    def merge(self, disk: str, *, keep: bool) -> None:
        """Merge the newest chain of a disk, with or without its states."""
        disks = self._stored(self.manifests())
        chains = [
            known for known, each in disks.items() if known[1] == disk and not each.get("snapshot")
        ]
        chained = [known for known in chains if disks[known]["level"] != "copy"]
        if not chained:
            return
        chain = self._chain(disks, chained[-1][0], disk)
        files = self._files()
        program, verb = ("qmprestore", "snapshotrebase") if keep else ("qmprebase", "rebase")
        result = self.run(verb, "--dir", self.target / disk, program=program)
        bad = [file for _, file in chain if self.target / file in self.damaged]
        if result.code != DONE:
            assert result.code in ({USAGE, DAMAGED} if bad else {USAGE}), str(result)
            assert result.code != USAGE or self._branches(disks, disk, chain), str(result)
            assert not self._tidy or self._files() == files, (
                f"a refusal changed something: {result}"
            )
            return
        assert not bad or len(chain) == 1, str(result)
        if not keep:
            self._forget(disk, [point for point, _ in chain[1:]])
        self._trust[disk].diff = self._trust[disk].inc

    def _branches(
        self, disks: Mapping[tuple[str, str], Any], disk: str, chain: list[tuple[str, str]]
    ) -> bool:
        """Whether anything builds on files in the middle of a chain."""
        inside = {point for point, _ in chain}
        return any(
            each["parent"] in inside and point not in inside
            for (point, owner), each in disks.items()
            if owner == disk
        )

    def _paths(self) -> list[Path]:
        return [path for path in self.target.rglob("*") if path.is_file()]

    def _files(self) -> dict[Path, tuple[int, int]]:
        """The state of everything in the target but locks."""
        found = {path: path.stat() for path in self._paths() if not path.name.startswith(".lock")}
        return {path: (each.st_mtime_ns, each.st_size) for path, each in found.items()}
