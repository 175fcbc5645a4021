# SPDX-License-Identifier: Apache-2.0
"""What the screen of a VM shows: a picture, and where it is VGA's text, that text.

Text is read out of the adapter's memory, so nothing is guessed from pixels. QEMU writes the picture into a
file of a folder that it may write to; what is there is as trustworthy as the guest, so it is read within
bounds and only if it is a plain file.
"""

import os
import re
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmpbackup.errors import CommandError
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.pixels import LARGEST, Pixels, pixels_of
from qmpbackup.plan.commands import Command

_COLUMNS, _ROWS = 80, 25
_TEXT_MODES = frozenset({(720, 400), (640, 400)})
_CELL = re.compile(r"0x([0-9a-f]{4})\b")
_LARGEST = 8 * 1024 * 1024
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Screen:
    """A picture (PNG; empty where there is none) and the text on it (empty where it is graphical);
    `pixels` are those of a graphical one."""

    picture: bytes = b""
    text: str = ""
    pixels: Pixels = Pixels()  # noqa: RUF009 - immutable

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        if len(self.picture) < 24:
            return (0, 0)
        width, height = struct.unpack(">II", self.picture[16:24])
        return width, height


def look(monitor: Monitor, file: Path) -> Screen:
    """What the first screen shows now; `file` is where QEMU may write. Nothing, if it has no screen."""
    try:
        monitor.execute(Command("screendump", {"filename": str(file), "format": "png"}))
    except CommandError:  # it has none, or this QEMU cannot write PNG
        return Screen()
    data = _written(file, _LARGEST)
    found = Screen(data if data.startswith(_PNG) else b"")
    if found.size in _TEXT_MODES:
        return Screen(found.picture, _text(monitor))
    return Screen(found.picture, pixels=_pixels(monitor, file)) if found.picture else found


def _pixels(monitor: Monitor, file: Path) -> Pixels:
    """The same picture in a form that is looked at without unpacking it."""
    try:
        monitor.execute(Command("screendump", {"filename": str(file), "format": "ppm"}))
    except CommandError:
        return Pixels()
    return pixels_of(_written(file, LARGEST))


def _written(file: Path, most: int) -> bytes:
    """What QEMU has written into a plain file."""
    with suppress(OSError):
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as opened:  # noqa: PTH123
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return opened.read(most)
    return b""


def _text(monitor: Monitor) -> str:
    """The characters of VGA's text mode: at 0xb8000, each with a byte for its colour."""
    line = f"xp /{_COLUMNS * _ROWS}hx 0xb8000"
    try:
        said = monitor.execute(Command("human-monitor-command", {"command-line": line}))
    except CommandError:
        return ""
    return text_of(str(said))


def text_of(dump: str) -> str:
    """The lines of a screen from what the monitor prints of its memory."""
    shown = re.sub(r"(?m)^[0-9a-f]+:", "", dump)
    cells = [int(cell, 16) & 0xFF for cell in _CELL.findall(shown)]
    characters = "".join(chr(each) if 32 <= each < 127 else " " for each in cells)
    lines = [characters[at : at + _COLUMNS] for at in range(0, len(characters), _COLUMNS)]
    return "\n".join(line.rstrip() for line in lines).rstrip()
