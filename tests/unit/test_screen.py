# SPDX-License-Identifier: Apache-2.0
"""What a screen shows, from what QEMU says of it."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpbackup.errors import CommandError
from qmpbackup.machine.pixels import Pixels, pixels_of
from qmpbackup.machine.screen import Screen, look, text_of
from qmpbackup.plan.commands import Command

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def dump(*lines: str) -> str:
    """Memory with these lines in it, as the monitor prints it: a character and its colour each."""
    cells = [f"0x07{ord(each):02x}" for line in lines for each in line.ljust(80)]
    rows = [cells[at : at + 8] for at in range(0, len(cells), 8)]
    return "".join(f"{at * 16 + 0xB8000:016x}: {' '.join(row)}\r\n" for at, row in enumerate(rows))


class FakeMonitor:
    """A QEMU that shows a picture of this size, or has no screen."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size

    def execute(self, command: Command) -> object:
        if command.name == "human-monitor-command":
            return dump("Booting from Hard Disk...", "vm login: ")
        if self.size is None:
            raise CommandError("screendump", "GenericError", "there is no screen")
        Path(str(command.arguments["filename"])).write_bytes(PNG + struct.pack(">II", *self.size))
        return {}


def test_text_is_read_from_memory() -> None:
    assert text_of(dump("a  b", "", "grub> ")) == "a  b\n\ngrub>"
    assert text_of(dump("\x00\xb0x")) == "  x"
    assert text_of("") == ""


@pytest.mark.parametrize(
    ("size", "text"),
    [((720, 400), "Booting from Hard Disk...\nvm login:"), ((1024, 768), ""), (None, "")],
)
def test_only_a_text_screen_has_text(
    size: tuple[int, int] | None, text: str, tmp_path: Path
) -> None:
    screen = look(FakeMonitor(size), tmp_path / "s.png")  # type: ignore[arg-type]
    assert screen.text == text
    assert screen.size == (size or (0, 0))


def test_a_picture_is_a_plain_file(tmp_path: Path) -> None:
    class Hostile(FakeMonitor):
        def execute(self, command: Command) -> object:
            path = Path(str(command.arguments["filename"]))
            path.symlink_to("/etc/passwd")
            return {}

    assert look(Hostile(None), tmp_path / "s.png") == Screen()  # type: ignore[arg-type]


def ppm(width: int, height: int, pixel: Callable[[int, int], tuple[int, int, int]]) -> bytes:
    """A picture whose pixels are those."""
    pixels = bytes(value for y in range(height) for x in range(width) for value in pixel(x, y))
    return b"P6\n%d %d\n255\n" % (width, height) + pixels


def photo(x: int, y: int) -> tuple[int, int, int]:
    """Colours such as a desktop has."""
    return x * 4 % 256, y * 5 % 256, (x + y) % 256


def console(x: int, y: int) -> tuple[int, int, int]:
    """White letters of several shades on black."""
    return (x * 7 % 256,) * 3 if x % 16 < 4 and y % 16 < 8 else (0, 0, 0)


def test_what_is_full_of_colours() -> None:
    assert pixels_of(ppm(320, 200, photo)).is_colourful
    assert not pixels_of(ppm(320, 200, console)).is_colourful
    assert not pixels_of(ppm(320, 200, lambda _x, _y: (0, 0, 170))).is_colourful
    assert not pixels_of(
        ppm(320, 200, lambda x, _y: (x % 256,) * 3)
    ).is_colourful  # a gradient alone


def test_a_cursor_makes_no_other_picture() -> None:
    def blinking(x: int, y: int) -> tuple[int, int, int]:
        return (255, 255, 255) if 8 <= x < 16 and 16 <= y < 32 else photo(x, y)

    shown = pixels_of(ppm(320, 200, photo))
    assert pixels_of(ppm(320, 200, blinking)).is_like(shown)
    assert not pixels_of(ppm(320, 200, console)).is_like(shown)
    assert not pixels_of(ppm(200, 320, photo)).is_like(shown)


@pytest.mark.parametrize(
    "file", [b"", b"P6", b"P6\n2 2\n255\nxxx", b"P6\n99999 99999\n255\n", b"P5\n1 1\n255\nx"]
)
def test_what_is_no_picture_shows_nothing(file: bytes) -> None:
    assert pixels_of(file) == Pixels()
    assert not pixels_of(file).is_colourful
