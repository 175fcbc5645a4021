# SPDX-License-Identifier: Apache-2.0
"""What programs find in the log of a `backup`: that it began, and how it ended, of which VM. People are
told in other words."""

import logging
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qmpbackup.cli.log_fields import Happening, about
from qmpbackup.errors import Interrupted, QmpBackupError

if TYPE_CHECKING:
    from qmpbackup.plan.progress import Progress
    from qmpbackup.service.backup import Outcome
    from qmpbackup.targets.interface import Address

log = logging.getLogger(__name__)


class BackupLog:
    """One backup; use as a context manager around it."""

    def __init__(self, target: "Address") -> None:
        from qmpbackup.machine.command_line import masked
        from qmpbackup.targets import opening

        (self._target,) = masked(
            [opening.entrance(target).spelled]
        )  # a location may hold a password
        self._vm = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, QmpBackupError | Interrupted):
            code = error.exit_status if isinstance(error, Interrupted) else error.exit_code
            self._say(Happening.FAILURE, "failed", exit_code=code)

    def watch(self, now: "Progress") -> None:
        """It goes on."""
        if not self._vm:
            self._vm = now.vm
            self._say(Happening.BEGIN, "begins")

    def ended(self, outcome: "Outcome", code: int) -> None:
        """A point was made."""
        self._vm = outcome.point.vm.identity.name
        self._say(Happening.END, "is done", point=outcome.point.id, exit_code=code)

    def _say(
        self, event: Happening, what: str, *, point: str = "", exit_code: int | None = None
    ) -> None:
        fields = about(
            event,
            for_programs=True,
            vm=self._vm,
            target=self._target,
            work="backup",
            point=point,
            exit_code=exit_code,
        )
        level = logging.WARNING if exit_code else logging.INFO
        level = logging.ERROR if event is Happening.FAILURE else level
        log.log(level, "%s → %s: backup %s.", self._vm or "A VM", self._target, what, extra=fields)
