# SPDX-License-Identifier: Apache-2.0
"""Which kind of target a place is: the one room that knows what kinds there are.

Each kind is imported only where it is meant. To add one: a package beside `folder` and `repository` that
implements `targets.interface`, a case here, and a maker in `tests/contract/test_target.py`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from qmpbackup.errors import UsageError
from qmpbackup.model import Location
from qmpbackup.targets.interface import Address, Entrance

_RESTIC = "restic:"


def place(text: str) -> Location | Path:
    """Where a target is, as users write it: a folder, or `restic:` and where a repository lies.

    Raises:
        UsageError: it reads like the one and is meant as the other.
    """
    if text.startswith(_RESTIC):
        return Location(text.removeprefix(_RESTIC))
    if ":" in text:
        from qmpbackup.restic.storage.location import is_remote

        if is_remote(text):
            raise UsageError(
                f"{text!r} reads like the location of a repository; write restic:{text}, or ./{text} "
                "for a folder."
            )
    return Path(text)


def holds_several(text: str) -> bool:
    """Whether a target at a place, as users write it, is for several VMs.

    Raises:
        UsageError: it is no place.
    """
    return entrance(place(text)).holds_several


def entrance(where: Address, variables: Mapping[str, str] | None = None) -> Entrance:
    """How the target at a place is opened: by what this process' environment says, or by `variables` in
    its place, where one process opens several."""
    match where:
        case Path():
            from qmpbackup.targets.folder.entrance import FolderEntrance

            return FolderEntrance(where)
        case Location():
            from qmpbackup.targets.repository.entrance import RepositoryEntrance

            return RepositoryEntrance(where, variables=variables)
        case _:
            return where


def is_inside_repository(folders: Iterable[Path]) -> bool:
    """Whether one of these folders is a repository, where only backups go."""
    from qmpbackup.restic.storage.local import is_repository

    return any(map(is_repository, folders))
