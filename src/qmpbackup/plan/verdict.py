# SPDX-License-Identifier: Apache-2.0
"""Whether a VM that was started has come up, judged by what it shows.

    PASS      the guest agent answers, or a login prompt stands on a serial port
    FAIL      QEMU ended, the kernel panicked, or a text that tells of a failed start stands still
    UNKNOWN   neither, in the time there was; never a guess

Pure: observations in, a verdict out.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

STILL_SECONDS = 25.0
"""How long a console says nothing more before what it said last counts."""

AGENT_SECONDS = 30.0
"""How long an agent has to answer after a login prompt is there, which is proof enough without it."""

_PROMPT = re.compile(r"(?:^|\n)[^\n]*\blogin: ?$")
_PANIC = re.compile(r"Kernel panic - not syncing[^\r\n]*")
_STUCK = re.compile(
    r"grub>|grub rescue>|\(initramfs\)|Booting from Hard Disk\.\.\.|No bootable device"
    r"|emergency mode|Give root password for maintenance|BOOTMGR is missing|Boot failed"
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f]")
_LAST = 2000


class BootVerdict(StrEnum):
    """How a drill ended."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Observation:
    """What is seen of a VM. `still` is for how many seconds its consoles have said nothing more, `agent`
    whether its guest agent answers and `has_agent` whether it has a port for one; `ended` is how QEMU
    ended."""

    console: str = ""
    still: float = 0.0
    agent: bool = False
    has_agent: bool = False
    ended: str = ""


def judged(seen: Observation) -> tuple[BootVerdict, str] | None:
    """The verdict and its reason, or `None` while there is none."""
    text = _ESCAPES.sub("", seen.console)[-_LAST:]
    panic = _PANIC.search(text)
    if seen.agent:
        return BootVerdict.PASS, "the guest agent answers"
    if panic:
        return BootVerdict.FAIL, panic.group()
    if seen.ended:
        return BootVerdict.FAIL, f"the VM ended by itself: {seen.ended}"
    if _PROMPT.search(text) and (not seen.has_agent or seen.still >= AGENT_SECONDS):
        return BootVerdict.PASS, "a login prompt is on the serial port"
    stuck = _STUCK.search(text.rstrip().rpartition("\n")[2]) or _STUCK.search(text[-400:])
    if stuck and seen.still >= STILL_SECONDS:
        return BootVerdict.FAIL, f"it stands still at: {stuck.group()}"
    return None
