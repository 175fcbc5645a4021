# SPDX-License-Identifier: Apache-2.0
"""Sockets that are named after VMs: which there are, and what each is the monitor of."""

import glob
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from qmpbackup.errors import UsageError

_STAR: Final = "*"
_VM: Final = "{vm}"
_LONGEST: Final = 128
"""Characters of a VM's name: it becomes that of a folder."""


def is_name(text: str) -> bool:
    """Whether something could be called so, and a folder after it."""
    return (
        0 < len(text) <= _LONGEST
        and text.isprintable()
        and text == text.strip()
        and "/" not in text
        and not text.startswith(("-", "."))
    )


@dataclass(frozen=True, slots=True)
class SocketPattern:
    """A path in which one part stands for names of VMs.

        /run/qemu/web-*.qmp         /run/qemu/qmp-{vm}.sock
        folder··· start·end         folder···      ·end

    A name begins with `start`, which is empty where `{vm}` says exactly what a name is. It goes up to
    `end`, which may go on in further folders.
    """

    text: str
    folder: str
    start: str
    before: str
    end: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """What a pattern says.

        Raises:
            UsageError: it is none.
        """
        mark = _VM if _VM in text else _STAR
        bare = text.replace(mark, "")
        if text.count(mark) != 1 or any(each in bare for each in "*?[]{}"):
            raise UsageError(
                "This is a path with one *, which stands for a VM's name, and no other pattern."
            )
        before, _, end = text.partition(mark)
        folder, slash, start = before.rpartition("/")
        return cls(text, folder + slash, start if mark == _STAR else "", before, end)

    def __str__(self) -> str:
        return self.text

    def name(self, socket: str) -> str:
        """The VM that a socket of this path would be of; empty: of none."""
        found = re.fullmatch(f"{re.escape(self.before)}([^/]*){re.escape(self.end)}", socket)
        return f"{self.start}{found[1]}" if found else ""

    def socket(self, vm: str) -> str:
        """Where the socket of a VM would be; empty: nowhere, as no VM here is called so."""
        path = f"{self.before}{vm.removeprefix(self.start)}{self.end}"
        return path if self.name(path) == vm else ""

    def present(self) -> dict[str, str]:
        """The VMs whose sockets are there, with those."""
        paths = _sockets(f"{glob.escape(self.before)}*{glob.escape(self.end)}")
        return {name: each for each in paths if is_name(name := self.name(each))}

    def alike(self) -> str:
        """A glob of sockets that are named like these, whatever their VMs are called."""
        beginning = self.folder if self.start else self.before
        return f"{glob.escape(beginning)}*{glob.escape(self.end)}"


def named_like(socket: str, vm: str) -> str:
    """A glob of sockets that are named like that of one VM; empty where its name tells nothing."""
    parts = socket.split("/")
    places = [index for index, part in enumerate(parts) if vm in part]
    if not socket.startswith("/") or len(places) != 1 or parts[places[0]].count(vm) != 1:
        return ""
    before, _, end = socket.partition(vm)
    return f"{glob.escape(before)}*{glob.escape(end)}"


def watched(globs: list[str]) -> set[str]:
    """The sockets that there are."""
    return {each for pattern in globs for each in _sockets(pattern)}


def _sockets(pattern: str) -> Iterator[str]:
    for path in sorted(glob.glob(pattern)):  # noqa: PTH207 - as text, from the root
        try:
            if stat.S_ISSOCK(Path(path).stat().st_mode):
                yield path
        except OSError:  # it has gone, or is not ours to see
            continue
