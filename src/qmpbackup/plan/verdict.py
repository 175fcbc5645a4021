# SPDX-License-Identifier: Apache-2.0
"""Whether a VM that was started has come up, judged by what it shows.

    PASS      the guest agent answers; or a login prompt stands on a serial port or a text screen; or
              what a graphical screen shows is at rest and full of colours, as no console and no firmware is
    FAIL      QEMU ended, the kernel panicked, the machine resets itself again and again, or a text that
              tells of a failed start stands still
    UNKNOWN   neither, in the time there was; never a guess. Any other graphical screen proves nothing

Pure: observations in, a verdict out.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

STILL_SECONDS = 25.0
"""How long a console says nothing more before what it said last counts."""

FINAL_SECONDS = 3.0
"""The same for what a firmware says when it has given up."""

MOST_RESETS = 4
"""So often a machine that comes up resets itself at most: updates do it once or twice."""

AGENT_SECONDS = 30.0
"""How long an agent has to answer after a login prompt is there, which is proof enough without it."""

PICTURE_SECONDS = 60.0
"""How long a picture hardly changes before it counts; three times that, where an agent may answer yet."""

_PROMPT = re.compile(r"(?:^|\n)[^\n]*\blogin: ?$")
_PANIC = re.compile(r"Kernel panic - not syncing[^\r\n]*")
_TIMER = re.compile(r"timer doesn't work")
"""Linux compares two clocks as it starts; where an emulator is not let run meanwhile, it takes one for broken."""

_STUCK = re.compile(
    r"grub>|grub rescue>|\(initramfs\)|Booting from Hard Disk\.\.\.|No bootable device"
    r"|emergency mode|Give root password for maintenance|BOOTMGR is missing|Boot failed"
)
_FINAL = re.compile(r"No bootable device")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f]")
_LAST = 2000


class BootVerdict(StrEnum):
    """How a drill ended."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    UNKNOWN = "unknown"


class Ready(StrEnum):
    """By what a VM is taken for one that has come up; its agent is proof in any case."""

    AGENT = "agent"
    LOGIN = "login"
    SCREEN = "screen"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Observation:
    """What is seen of a VM. `still` is for how many seconds its consoles have said nothing more, and
    `screen_still` the same of the text on its screen, and `picture_still` of a picture full of colours there;
    `agent` is whether its guest agent answers and
    `has_agent` whether it has a port for one; `resets` is how often it has reset itself, `ended` how QEMU
    ended, and `killed` that it was killed from outside."""

    console: str = ""
    still: float = 0.0
    screen: str = ""
    screen_still: float = 0.0
    picture_still: float = 0.0
    resets: int = 0
    agent: bool = False
    has_agent: bool = False
    ended: str = ""
    killed: bool = False


Judgement = tuple[BootVerdict, str]
"""A verdict and its reason."""

_Shown = tuple[tuple[str, str, float], ...]


def judged(seen: Observation, ready: Ready = Ready.ANY) -> Judgement | None:
    """The verdict and its reason, or `None` while there is none."""
    if seen.agent:
        return BootVerdict.PASS, "the guest agent answers"
    shown = (
        ("the serial port", _ESCAPES.sub("", seen.console)[-_LAST:], seen.still),
        ("the screen", seen.screen, seen.screen_still),
    )
    return (
        _broken_down(seen, shown)
        or _prompting(seen, shown, ready)
        or _standing_still(shown)
        or _at_rest(seen, ready)
    )


def _broken_down(seen: Observation, shown: _Shown) -> Judgement | None:
    for _, text, _ in shown:
        panic = _PANIC.search(text)
        if panic and _TIMER.search(panic.group()):
            return BootVerdict.UNKNOWN, f"{panic.group()} (as on a host that is too busy)"
        if panic:
            return BootVerdict.FAIL, panic.group()
    if seen.killed:
        return BootVerdict.UNKNOWN, "somebody killed QEMU, or the host had no memory for it"
    if seen.ended:
        return BootVerdict.FAIL, f"the VM ended by itself: {seen.ended}"
    if seen.resets > MOST_RESETS:
        return BootVerdict.FAIL, f"it has reset itself {seen.resets} times, and did not come up"
    return None


def _prompting(seen: Observation, shown: _Shown, ready: Ready) -> Judgement | None:
    for where, text, still in shown:
        if _PROMPT.search(text) and _counts(Ready.LOGIN, ready, seen, still >= AGENT_SECONDS):
            return BootVerdict.PASS, f"a login prompt is on {where}"
    return None


def _standing_still(shown: _Shown) -> Judgement | None:
    for where, text, still in shown:
        stuck = _stuck(text, still)
        if stuck:
            return BootVerdict.FAIL, f"it stands still at: {stuck}, on {where}"
    return None


def _at_rest(seen: Observation, ready: Ready) -> Judgement | None:
    late = seen.picture_still >= 3 * PICTURE_SECONDS
    if seen.picture_still >= PICTURE_SECONDS and _counts(Ready.SCREEN, ready, seen, late):
        return BootVerdict.PASS, "the screen shows a picture that is at rest"
    return None


def _counts(sign: Ready, ready: Ready, seen: Observation, late: bool) -> bool:
    """Whether a sign is proof: one that was asked for is at once, and any one is once an agent, if there is
    one, is late."""
    return ready is sign or (ready is Ready.ANY and (late or not seen.has_agent))


def _stuck(text: str, still: float) -> str:
    """What a text that stands still tells of a failed start."""
    if still < FINAL_SECONDS:
        return ""
    last = text.rstrip().rpartition("\n")[2]
    kinds = (_FINAL, _STUCK) if still >= STILL_SECONDS else (_FINAL,)
    for kind in kinds:
        found = kind.search(last) or kind.search(text[-400:])
        if found:
            return found.group()
    return ""
