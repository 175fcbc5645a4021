# SPDX-License-Identifier: Apache-2.0
"""A restic repository that a user names as a target: how it is opened, and whether it is well.

Location and password are taken as restic takes them, from the environment.
"""

import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Self

from qmpbackup import process
from qmpbackup.errors import NoSuchTarget, QmpBackupError
from qmpbackup.model import Location, Point, VmIdentity
from qmpbackup.plan.finding import Finding, Health
from qmpbackup.restic import password
from qmpbackup.restic.repository import Repository
from qmpbackup.restic.storage.location import connect
from qmpbackup.targets.interface import Found, Made, Wish
from qmpbackup.targets.overview import Overview
from qmpbackup.targets.repository.access import Access
from qmpbackup.targets.repository.chunk_list import CHUNK
from qmpbackup.targets.repository.opening import RepositoryOpening, refuse_what_makes_no_sense
from qmpbackup.targets.repository.target import RepositoryTarget


@dataclass(frozen=True, slots=True)
class RepositoryEntrance:
    """See `Entrance`. `typed` is the password, where somebody has been asked for it; `variables` are
    what is known in place of this process' environment, and then nobody is asked."""

    location: Location
    typed: str = field(default="", repr=False)
    variables: Mapping[str, str] | None = field(default=None, repr=False)

    @property
    def chunk(self) -> int:
        """Disks are taken in chunks."""
        return CHUNK

    @property
    def holds_several(self) -> bool:
        """A repository may hold many VMs, of many hosts."""
        return True

    @property
    def spelled(self) -> str:
        """The location; the path from the root, where it is one."""
        text = self.location.text
        return str(self.location) if ":" in text or not text else f"restic:{Path(text).absolute()}"

    def asked(self) -> Self:
        """With the password, where somebody types it: other processes have no terminal."""
        told = any(name.startswith("RESTIC_PASSWORD") for name in os.environ)
        if self.typed or told or not sys.stdin.isatty():
            return self
        return replace(self, typed=password.read(os.environ))

    def environment(self) -> Mapping[str, str]:
        """The password that was typed."""
        return {"RESTIC_PASSWORD": self.typed} if self.typed else {}

    @property
    def _password(self) -> str:
        return self.typed or password.read(self._variables, ask=self.variables is None)

    @property
    def _variables(self) -> Mapping[str, str]:
        return os.environ if self.variables is None else self.variables

    def handed_on(self) -> tuple[str, Mapping[str, str]]:
        """The location is in the environment, where restic's own variables are."""
        from_environment = str(Location(""))
        if not self.location.text:
            return from_environment, {}
        location = self.spelled.removeprefix(from_environment)
        return from_environment, {"RESTIC_REPOSITORY": location, "RESTIC_REPOSITORY_FILE": ""}

    @contextmanager
    def opened(self, vm: str = "") -> Iterator[RepositoryTarget]:
        """Open it to read from: the points of the named VM, or of the only one there is."""
        with self._repository(to_read=True) as (found, access):
            target = RepositoryTarget.only(found, vm)
            target.access = access
            yield target

    @contextmanager
    def of(self, vm: VmIdentity) -> Iterator[RepositoryTarget]:
        """Open it to read the points of this VM."""
        with self._repository() as (found, _):
            yield RepositoryTarget(found, vm)

    def newest(self, vm: str) -> Point | None:
        """The newest point of the VM."""
        try:
            with self.opened(vm) as target:
                points = target.load().points
        except NoSuchTarget:
            return None
        return points[-1] if points else None

    def overview(self, now: datetime) -> Overview:
        """What it holds of all VMs of all hosts."""
        from qmpbackup.targets.repository import overview

        with self._repository() as (found, _):
            return overview.overview(found, now)

    def advice(
        self, vm: VmIdentity, wait: float, *, strict: bool
    ) -> Generator[Finding, None, Found | None]:
        """What is missing on this machine, whether it opens, and what is damaged."""
        yield from _programs()
        try:
            with self.of(vm) as target:
                with target.lock(wait=wait):
                    stored = target.load()
                if strict:
                    target.require_known()
        except QmpBackupError as error:
            yield Finding("target", Health.PROBLEM, error.message, error.hint)
            return None
        for damage in stored.damaged:
            todo = "Run `qmpbackup verify`; other points can be restored."
            yield Finding("target", Health.PROBLEM, f"{damage.path}: {damage.reason}", todo)
        count = len(stored.points)
        yield Finding("target", Health.FINE, f"{target.name} holds {count} points of {target.vm}")
        return Found(target, stored)

    @contextmanager
    def opening(self, wish: Wish) -> Iterator[RepositoryOpening]:
        """Open it in a thread: what a password costs takes a while, and needs nobody to wait."""
        refuse_what_makes_no_sense(wish)
        with self._ahead() as found:
            yield RepositoryOpening(found, wish)

    def sweep(self, wait: float) -> int:
        """Have restic do it."""
        from qmpbackup.targets.repository import removing

        until = time.monotonic() + wait
        with self._repository() as (found, access):
            found.storage.require_ours()
            before = removing.stored(found)
            removing.sweep_all(access, until)
            return before - removing.stored(found)

    def make(self) -> Made:
        """Make a repository, as `restic init` does."""
        with connect(self.location.text, os.environ) as storage:
            made = Repository.create(storage, password.read(os.environ, confirm=True))
            return Made(made.config.id, storage.name)

    @contextmanager
    def _repository(self, *, to_read: bool = False) -> Iterator[tuple[Repository, Access]]:
        variables = self._variables
        if to_read:
            process.use_memory_again()
        with connect(self.location.text, variables) as storage:
            # Once: what was typed is not in the environment that restic inherits.
            access = Access(self.location, self._password)
            opened = Repository.open(storage, access.secret, environment=variables, to_read=to_read)
            with opened as found:
                yield found, access

    @contextmanager
    def _ahead(self) -> Iterator[Callable[[], Repository]]:
        """Gives the function that waits for the repository, and raises what opening it raises."""
        from concurrent.futures import ThreadPoolExecutor

        with ExitStack() as stack:
            storage = stack.enter_context(connect(self.location.text, os.environ))
            secret = self._password
            thread = stack.enter_context(ThreadPoolExecutor(1, "opening"))
            opening = thread.submit(Repository.open, storage, secret)
            stack.push(lambda *error: storage.give_up() if error[0] else None)
            yield lambda: stack.enter_context(opening.result())


def _programs() -> Iterator[Finding]:
    """What a repository needs besides QEMU."""
    import shutil
    from importlib.util import find_spec

    if find_spec("nbd") is None:
        yield Finding(
            "libnbd",
            Health.PROBLEM,
            "libnbd's module for Python is not installed",
            "On Debian and Ubuntu: apt install python3-libnbd.",
        )
    if shutil.which("restic") is None:
        yield Finding(
            "restic",
            Health.ADVICE,
            "the program restic is not installed; only `prune` needs it",
            "On Debian and Ubuntu: apt install restic.",
        )
