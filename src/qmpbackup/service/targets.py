# SPDX-License-Identifier: Apache-2.0
"""Which kind of target a place is, opened to be read; what use cases ask of any kind."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from qmpbackup.errors import UsageError
from qmpbackup.model import Location, Place
from qmpbackup.targets.inventory import Inventory

if TYPE_CHECKING:
    from qmpbackup.restic.repository import Repository
    from qmpbackup.targets.folder.target import DirectoryTarget
    from qmpbackup.targets.repository.target import RepositoryTarget


class Target(Protocol):
    """What both kinds of target have: their points, and a lock."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def load(self) -> Inventory:
        """All points, and what could not be read."""

    def lock(
        self, *, write: bool = False, remove: bool = False, wait: float = 0.0
    ) -> AbstractContextManager[None]:
        """Hold the target for the block."""

    def elsewhere(self) -> str:
        """Where points are that this target does not hold itself, as a sentence."""


@contextmanager
def opened(
    place: Place, vm: str = "", secret: str = ""
) -> "Iterator[DirectoryTarget | RepositoryTarget]":
    """Open a target to read from; in a repository the named VM's, or that of the only one.

    `secret` is the password of a repository, if it has been asked for already.

    Raises:
        NoSuchTarget: there is none.
        UsageError: a repository holds several VMs and none was named, or a folder and one was.
        WrongPassword: it does not open the repository.
    """
    if isinstance(place, Location):
        from qmpbackup.targets.repository.target import RepositoryTarget

        with repository(place, secret) as found:
            yield RepositoryTarget.only(found, vm)
        return
    from qmpbackup.targets.folder.target import DirectoryTarget

    if vm:
        raise UsageError("A folder holds the points of one VM.", "Leave --vm out.")
    yield DirectoryTarget.open(place)


@contextmanager
def repository_ahead(place: Location) -> "Iterator[Callable[[], Repository]]":
    """Open a repository in a thread: what a password costs takes a while, and needs nobody to wait.

    Gives the function that waits for it, and raises what `repository` raises.
    """
    import os
    from concurrent.futures import ThreadPoolExecutor

    from qmpbackup.restic import password
    from qmpbackup.restic.repository import Repository
    from qmpbackup.restic.storage.location import connect

    with ExitStack() as stack:
        storage = stack.enter_context(connect(place.text, os.environ))
        secret = password.read(os.environ)
        thread = stack.enter_context(ThreadPoolExecutor(1, "opening"))
        opening = thread.submit(Repository.open, storage, secret)
        stack.push(lambda *error: storage.give_up() if error[0] else None)
        yield lambda: stack.enter_context(opening.result())


@contextmanager
def repository(place: Location, secret: str = "") -> "Iterator[Repository]":
    """Open a restic repository, with location and password as restic takes them.

    `secret` is the password, if it has been asked for already.

    Raises:
        NoSuchTarget: there is no repository.
        WrongPassword: the password does not open it.
        UsageError: no password can be had, or the location is none.
    """
    import os

    from qmpbackup.restic import password
    from qmpbackup.restic.repository import Repository
    from qmpbackup.restic.storage.location import connect

    with (
        connect(place.text, os.environ) as storage,
        Repository.open(storage, secret or password.read(os.environ)) as found,
    ):
        yield found
