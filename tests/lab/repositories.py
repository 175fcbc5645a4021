# SPDX-License-Identifier: Apache-2.0
"""Restic repositories as targets of tests: read with the real restic alone."""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.restic import PASSWORD, Restic

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Repository:
    """A repository at `location` (restic's words), and what programs need to use it.

    As text it is what `--target` takes. `folder` holds caches: the product's own, and restic's.
    """

    location: str
    folder: Path
    password: str = PASSWORD
    variables: Mapping[str, str] = field(default_factory=dict)
    _manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    _ids: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"restic:{self.location}"

    @property
    def environment(self) -> dict[str, str]:
        """What the product needs to know."""
        return {
            "RESTIC_PASSWORD": self.password,
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
            **self.variables,
        }

    @property
    def restic(self) -> Restic:
        """The real restic with this repository, and without what the product has cached."""
        cache = self.folder / "restic-cache"
        return Restic(self.location, cache, self.password, environment=self.variables)

    @property
    def id(self) -> str:
        """Its id, as its config says."""
        if not self._ids:
            self._ids.append(str(self.restic("cat", "config").json["id"]))
        return self._ids[0]

    def snapshots(self) -> list[dict[str, Any]]:
        """What restic lists."""
        found: list[dict[str, Any]] = self.restic("snapshots", "--json").json or []
        return found

    def manifests(self) -> list[dict[str, Any]]:
        """The manifests of all points, in the order in which they were made."""
        found = [self._manifest(each) for each in self.snapshots()]
        return sorted(found, key=lambda point: int(point["sequence"]))

    def _manifest(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        name = snapshot["id"]
        if name not in self._manifests:
            (path,) = snapshot["paths"]
            dumped = self.restic("dump", name, f"{path}/{MANIFEST}")
            self._manifests[name] = dumped.json
        return self._manifests[name]

    def snapshot_of(self, point: str) -> dict[str, Any]:
        """The snapshot of a point."""
        (found,) = (
            each for each in self.snapshots() if f"point={point}" in (each.get("tags") or ())
        )
        return found

    def vm_of(self, point: str) -> str:
        """What `--vm` takes for the VM of a point: its UUID, else its name as it stands in paths."""
        snapshot = self.snapshot_of(point)
        (path,) = snapshot["paths"]
        return str(self._manifest(snapshot)["vm"]["uuid"] or str(path).removeprefix("/"))

    def restored(self, point: str) -> dict[str, bytes]:
        """What restic gives back of a point: the bytes of each disk."""
        dumped = self.restic("dump", self.snapshot_of(point)["id"], "/")
        found = {}
        with tarfile.open(fileobj=io.BytesIO(dumped.out)) as tar:
            for member in tar:
                reader = tar.extractfile(member)
                if reader and member.name.endswith(".raw"):
                    found[Path(member.name).stem] = reader.read()
        return found

    def assert_whole(self, *, read_data: bool = False) -> None:
        """`restic check` has no complaint, and nobody's lock is left.

        Taking its own, exclusive lock, restic would find one that blocks.
        """
        assert self.restic("list", "locks", "--no-lock").text == ""
        checked = self.restic("check", *(["--read-data"] if read_data else []))
        assert "no errors were found" in checked.text, str(checked)


Target = Path | Repository
"""Where points go."""


def environment_of(target: Target) -> Mapping[str, str]:
    """What the product must be told to use a target."""
    return target.environment if isinstance(target, Repository) else {}
