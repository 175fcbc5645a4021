# SPDX-License-Identifier: Apache-2.0
"""Pictures of screens, as QEMU writes them without compression (PPM): whether two are alike, and whether one
is full of colours.

A console that is drawn pixel by pixel, a firmware's logo or an error's blue page is mostly one colour; what
people log in at often is not. So what is colourful tells of a system that came up, and what is not, nothing.
"""

import re
from collections import Counter
from dataclasses import dataclass

LARGEST = 64 * 1024 * 1024
"""Bytes of a picture that is looked at, at most."""

_HEADER = re.compile(rb"P6\n(\d{1,5}) (\d{1,5})\n255\n")
_ROW_STEP, _COLUMN_STEP = 8, 4
_SHADES = 0xF8
_LEAST_COLOURS = 48
_MOST_OF_ONE = 0.6
_ALIKE = 0.98


@dataclass(frozen=True, slots=True)
class Pixels:
    """Some pixels of a picture, spread evenly; none, where there is no picture."""

    size: tuple[int, int] = (0, 0)
    colours: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_colourful(self) -> bool:
        """Whether it has many colours, and none that most of it has."""
        counts = Counter((r & _SHADES, g & _SHADES, b & _SHADES) for r, g, b in self.colours)
        if len(counts) < _LEAST_COLOURS:
            return False
        return counts.most_common(1)[0][1] <= _MOST_OF_ONE * len(self.colours)

    def is_like(self, other: "Pixels") -> bool:
        """Whether nearly all of it is the same: a cursor or a clock makes no other picture."""
        if self.size != other.size:
            return False
        same = sum(map(tuple.__eq__, self.colours, other.colours))
        return same >= _ALIKE * len(self.colours)


def pixels_of(picture: bytes) -> Pixels:
    """What a picture shows; nothing, where that is none."""
    head = _HEADER.match(picture)
    if head is None:
        return Pixels()
    width, height = int(head[1]), int(head[2])
    if len(picture) != head.end() + width * height * 3:
        return Pixels()
    colours: list[tuple[int, int, int]] = []
    step = 3 * _COLUMN_STEP
    for row in range(0, height, _ROW_STEP):
        start = head.end() + row * width * 3
        line = picture[start : start + width * 3]
        colours += zip(line[0::step], line[1::step], line[2::step], strict=True)
    return Pixels((width, height), tuple(colours))
