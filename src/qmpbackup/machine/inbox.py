# SPDX-License-Identifier: Apache-2.0
"""What arrives from a monitor, within bounds: whoever speaks to us may send without end.

`qemu.qmp` keeps every event for ever and believes every line. Here events that nobody waits for are
dropped as they come, replies are parsed only where their values fit into what one question may take,
and a flood of either ends the connection. Must not know what a caller wanted.
"""

from collections.abc import Callable
from typing import Final

from qemu.qmp import QMPClient
from qemu.qmp.error import ProtocolError
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message

from qmpbackup import bounded_json
from qmpbackup.plan.names import RUN_PREFIX

LONGEST_LINE: Final = 16 << 20
"""Bytes of one message. The largest of QEMU's own, `query-named-block-nodes` of fifty disks with
chains of thirty images, has some 6 MiB."""

MOST_MEMORY: Final = 112 << 20
"""Bytes that the replies to questions sent at once may take together, reckoned on the safe side."""

MOST_EVENTS: Final = 4000
"""Events of our jobs that may wait for somebody to look; a run has some ten for each disk."""

_COST_OF_A_LINE: Final = 64
"""Bytes that Python takes for a line beside what is in it."""

_LARGEST_EVENT: Final = 8192
"""Bytes of memory that one of them takes at most."""

AWAITED: Final = frozenset({"JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR"})
"""The events that anybody waits for; of these, only those of jobs of ours are kept."""


class Flood(ProtocolError):
    """More came than any QEMU sends."""


class Inbox(EventListener):
    """The events that somebody waits for, and nothing of all others."""

    async def put(self, event: Message) -> None:
        """Keep an event.

        Raises:
            Flood: too many wait already.
        """
        if self._queue.qsize() >= MOST_EVENTS:
            raise Flood("events of our jobs come without end")
        await self._queue.put(event)


class Client(QMPClient):
    """The library's client, with bounds, and without the text of messages that it renders for its log.

    `on_line` is called whenever something has come.
    `fault` says what was wrong with the message that ended the connection, if one did; `resets` is how
    often the guest has reset itself since.
    """

    def __init__(self, on_line: Callable[[], None]) -> None:
        super().__init__("qmpbackup", LONGEST_LINE)
        self._on_line = on_line
        self.inbox = Inbox()
        self.fault = ""
        self.resets = 0
        self._left = MOST_MEMORY

    def begin(self) -> None:
        """Give the answers to what is asked next all the memory that they may have."""
        self._left = MOST_MEMORY

    async def _do_recv(self) -> Message:
        line = await self._whole_line()
        if line.rstrip() == b"{":
            line = await self._printed_prettily(line)
        try:
            value = bounded_json.load(line, self._left)
        except bounded_json.TooLarge as error:
            raise self._refused("it is larger than any of QEMU's") from error
        except ValueError as error:
            raise self._refused("it is no JSON") from error
        if not isinstance(value, dict):
            raise self._refused("it is no JSON object")
        taken = bounded_json.cost(line)
        if "event" not in value:
            self._left -= taken
        elif not _is_wanted(value):
            self.resets += _is_reset(value)
            value = _NOTHING
        elif taken > _LARGEST_EVENT:
            raise self._refused("an event is larger than any of QEMU's")
        return Message(value, eager=False)

    async def _whole_line(self) -> bytes:
        try:
            line = await self._readline()
        except ValueError as error:
            raise self._refused("a line of it has no end") from error
        self._on_line()
        if not line.endswith(b"\n"):
            raise EOFError  # half a message, and nobody is there for the rest
        return line

    async def _printed_prettily(self, first: bytes) -> bytes:
        """A message of a monitor with `pretty=on`: lines of which only the first and the last are not
        indented."""
        lines, length = [first], 0
        while lines[-1].rstrip() != b"}" or len(lines) == 1:
            lines.append(await self._whole_line())
            length += len(lines[-1]) + _COST_OF_A_LINE
            if length > LONGEST_LINE:
                raise self._refused("it has no end")
        return b"".join(lines)

    async def _on_message(self, msg: Message) -> None:
        number = msg.get("id", "")
        if msg == _NOTHING:
            return
        if "event" in msg:
            try:
                await self.inbox.put(msg)
            except Flood as error:
                raise self._refused(str(error)) from error
        elif not isinstance(number, str):
            raise self._refused("its id is none that we gave")
        elif number in self._pending or ("error" in msg and "id" not in msg):
            await super()._on_message(msg)
        # Answers to nobody end here: the library would render all of them for its log.

    def _refused(self, why: str) -> Flood:
        self.fault = why
        return Flood(why)

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


_NOTHING: Final[dict[str, object]] = {"event": ""}
"""What is made of an event that nobody waits for."""


def _is_reset(event: dict[str, object]) -> bool:
    """Whether it says that the guest has reset itself, of which there may be any number."""
    data = event.get("data")
    return event["event"] == "RESET" and isinstance(data, dict) and data.get("guest") is True


def _is_wanted(event: dict[str, object]) -> bool:
    """Whether an event is of a job of ours; one that is no event is for the caller to refuse."""
    name, data = event["event"], event.get("data")
    if not isinstance(name, str):
        return True
    if name not in AWAITED:
        return False
    jobs = [data.get(key) for key in ("id", "device")] if isinstance(data, dict) else [None]
    return not all(isinstance(job, str) and not job.startswith(RUN_PREFIX) for job in jobs if job)
