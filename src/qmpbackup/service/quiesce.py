# SPDX-License-Identifier: Apache-2.0
"""Freezing the guest's file systems for the instant, and thawing them whatever happens.

Everything that can be asked or prepared comes before the freeze; between freeze and thaw there is
nothing but the instant. A watchdog process thaws if we die. A marker object inside QEMU tells the
next run that it was we who froze the guest, should watchdog and we both be killed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qmpbackup.errors import (
    CommandError,
    GuestStateUnknown,
    Interrupted,
    QmpBackupError,
    QuiesceError,
    UsageError,
)
from qmpbackup.machine.agent import ANSWER_SECONDS, Agent
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.watchdog import Watchdog
from qmpbackup.model import Quiesce
from qmpbackup.plan.commands import Command
from qmpbackup.plan.names import FROZEN_MARKER

log = logging.getLogger(__name__)

FREEZE_SECONDS = 30.0
"""Longest wait for a guest to flush and freeze."""

FROZEN_SECONDS = 15.0
"""The watchdog's bound on the frozen state: longer than any instant, `view.STOP_SECONDS`."""


class Guest:
    """The guest's side of one run.

    `complaints` are sentences about a quiesce that was only tried and failed; `was_frozen` says
    whether the file systems were frozen during the whole instant.
    """

    def __init__(self, monitor: Monitor, agent_address: str, quiesce: Quiesce) -> None:
        if quiesce is Quiesce.REQUIRE and not agent_address:
            raise UsageError(
                "--quiesce needs the socket of the guest agent.",
                "Name it with --agent-socket PATH.",
            )
        self._monitor = monitor
        self._address = agent_address
        self._quiesce = quiesce
        self._agent: Agent | None = None
        self.complaints: list[str] = []
        self._holds = False
        self.was_frozen = False

    @contextmanager
    def connected(self) -> Iterator[int | None]:
        """Reach the agent, if the run wants it; yields the connection's descriptor.

        Raises:
            QuiesceError: quiescing is required and there is no agent.
        """
        with self._forgiven():
            if self._quiesce is not Quiesce.NO:
                self._agent = self._reach()
        try:
            yield self._agent.fileno() if self._agent else None
        finally:
            if self._agent:
                self._agent.close()

    @contextmanager
    def frozen(self, watchdog: Watchdog) -> Iterator[None]:
        """Keep the file systems frozen inside the block, if the run wants that and it works.

        Raises:
            QuiesceError: quiescing is required, and the freeze failed or did not last.
        """
        agent = self._agent
        if agent is None:
            yield
            return
        try:
            with self._forgiven():
                self._freeze(agent, watchdog)
            yield
        except BaseException:
            with suppress(QuiesceError):  # what went wrong first is what the user must hear of
                self._end_freeze(agent, watchdog)
            raise
        with self._forgiven():
            self._end_freeze(agent, watchdog)

    def heal(self) -> list[str]:
        """Thaw a guest that a run of ours left frozen; the marker in QEMU says that it was ours."""
        agent = self._reach()
        try:
            thawed = agent.thaw() if agent.frozen() else 0
        finally:
            agent.close()
        self._unmark()
        return [f"thawed {thawed} file systems that a run that died had frozen"] if thawed else []

    def _reach(self) -> Agent:
        if not self._address:
            raise QuiesceError(
                "The guest agent's socket is not known.", "Name it with --agent-socket PATH."
            )
        return Agent.connect(self._address)

    def _freeze(self, agent: Agent, watchdog: Watchdog) -> None:
        if agent.frozen():
            raise QuiesceError(
                "The guest's file systems are already frozen, by somebody else.",
                "Find out who froze them; a thaw of ours would undo theirs.",
            )
        watchdog.arm_freeze(FREEZE_SECONDS + 2 * ANSWER_SECONDS)
        self._mark()
        try:
            count = agent.freeze(FREEZE_SECONDS)
        except GuestStateUnknown:
            raise  # the watchdog goes on thawing, and the marker tells the next run
        except (QmpBackupError, Interrupted):
            self._unmark()
            watchdog.disarm_freeze()
            raise
        self._holds = True
        log.info("Froze %d file systems of the guest.", count)
        watchdog.arm_freeze(FROZEN_SECONDS)

    def _end_freeze(self, agent: Agent, watchdog: Watchdog) -> None:
        if not self._holds:
            return
        self._holds = False
        lasted = agent.thaw() > 0
        self._unmark()
        watchdog.disarm_freeze()
        if not lasted:
            raise QuiesceError(
                "The guest's file systems did not stay frozen for the whole instant.",
                "Something in the guest thawed them; Windows does so after 10 seconds. Run again "
                "when the guest and this host have less to do.",
            )
        self.was_frozen = True

    def _mark(self) -> None:
        marker = {"qom-type": "throttle-group", "id": FROZEN_MARKER}
        try:
            self._monitor.execute(Command("object-add", marker))
        except CommandError as error:
            log.debug("The marker of the freeze was there already: %s", error)

    def _unmark(self) -> None:
        try:
            self._monitor.execute(Command("object-del", {"id": FROZEN_MARKER}))
        except CommandError as error:
            log.debug("The marker of the freeze was gone: %s", error)

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        """A failing quiesce ends the run if it was required, and is noted if it was only tried."""
        try:
            yield
        except QuiesceError as error:
            if self._quiesce is not Quiesce.TRY:
                raise
            log.warning("Not quiesced: %s", error)
            self.complaints.append(f"not quiesced: {error.message}")
