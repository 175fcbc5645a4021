# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line, taken apart and put together again (QEMU qemu-options.hx, util/keyval.c).

    -device virtio-blk-pci,id=vda,drive=d      an option and its members; the first may lack its name
    -device {"driver": "virtio-blk-pci", …}    the same as JSON
    -S                                         a flag

Pure: knows the forms; must not know what is to be changed.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FLAGS = frozenset(
    [
        "S",
        "no-shutdown",
        "no-reboot",
        "nodefaults",
        "no-user-config",
        "nographic",
        "enable-kvm",
        "daemonize",
        "snapshot",
        "no-hpet",
        "no-acpi",
        "no-fd-bootchk",
        "full-screen",
        "usb",
        "win2k-hack",
        "singlestep",
        "semihosting",
        "mem-prealloc",
        "preconfig",
        "enable-fips",
        "only-migratable",
        "xen-attach",
        "xen-domid-restrict",
        "old-param",
        "no-quit",
        "portrait",
        "alt-grab",
        "ctrl-grab",
        "s",
        "curses",
        "sdl",
        "version",
        "help",
        "h",
        "enable-sync-profile",
    ]
)
"""Options without a value."""

IMPLIED: Mapping[str, str] = {
    "device": "driver",
    "object": "qom-type",
    "chardev": "backend",
    "netdev": "type",
    "nic": "type",
    "net": "type",
    "machine": "type",
    "accel": "accel",
    "audiodev": "driver",
    "audio": "driver",
    "blockdev": "driver",
    "tpmdev": "type",
    "mon": "chardev",
    "fsdev": "fsdriver",
    "virtfs": "fsdriver",
}
"""The member that an option's first word is, where it has no name."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What follows an option: its members in their order. Those given alone are `None`."""

    values: Mapping[str, Any]
    is_json: bool = False
    implied: str = ""

    def text(self, name: str) -> str:
        """A member as text; empty where there is none."""
        value = self.values.get(name)
        return value if isinstance(value, str) else "" if value is None else json.dumps(value)

    def replaced(self, changes: Mapping[str, Any]) -> "Parameters":
        """With other members, in their old places where they had some."""
        return Parameters({**self.values, **changes}, self.is_json, self.implied)

    def without(self, *names: str) -> "Parameters":
        """Without some members."""
        kept = {name: value for name, value in self.values.items() if name not in names}
        return Parameters(kept, self.is_json, self.implied)

    def render(self) -> str:
        """As QEMU takes it."""
        if self.is_json:
            return json.dumps(self.values)
        return ",".join(self._rendered())

    def _rendered(self) -> Iterator[str]:
        for name, value in self.values.items():
            if value is None:
                yield escaped(name)
            elif name == self.implied:
                yield escaped(str(value))
            else:
                yield f"{name}={escaped(str(value))}"


@dataclass(frozen=True, slots=True)
class QemuOption:
    """One option; `name` is without its dash, empty for an image that stands alone."""

    name: str
    value: str | None = None
    members: Parameters = field(default_factory=lambda: Parameters({}))

    def with_members(self, members: Parameters) -> "QemuOption":
        """The same option with other members."""
        return QemuOption(self.name, members.render(), members)


def option(name: str, value: str | None = None) -> QemuOption:
    """An option with its members taken apart."""
    return QemuOption(name, value, members_of(name, value or ""))


def program_of(words: Sequence[str]) -> int:
    """How many words name the program: more than one where it was run by a loader of libraries, which
    takes options of its own before it (ld.so(8))."""
    if not words or not words[0].rpartition("/")[2].startswith("ld"):
        return 1
    at = 1
    while at < len(words) and words[at].startswith("--"):
        at += 2 if words[at] in _OF_THE_LOADER else 1
    return at + 1


_OF_THE_LOADER = frozenset(
    {"--library-path", "--argv0", "--preload", "--audit", "--glibc-hwcaps-prepend"}
)


def parse(words: Sequence[str]) -> Iterator[QemuOption]:
    """The options of a command line, without the program."""
    left = iter(words)
    for word in left:
        if not word.startswith("-") or word == "-":
            yield QemuOption("", word)
            continue
        name = word.removeprefix("-").removeprefix("-")
        yield option(name, None if name in FLAGS else next(left, ""))


def node_names(words: Sequence[str]) -> frozenset[str]:
    """The names of the nodes that a command line makes; no drive has one of these."""
    options = parse(words[program_of(words) :])
    return frozenset(each.members.text("node-name") for each in options if each.name == "blockdev")


_UNITS = {"": 20, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([BKMGT]?)", re.IGNORECASE)


def memory_of(words: Sequence[str]) -> tuple[int, int]:
    """The bytes of memory of a machine, at least and at most, as its command line says: objects with memory
    may be part of what `-m` says, or come to it."""
    main = backends = 0
    for each in parse(words[program_of(words) :]):
        if each.name == "m":
            main = _bytes(each.members.text("size") or (each.value or "").partition(",")[0])
        elif each.name == "object" and each.members.text("qom-type").startswith("memory-backend"):
            backends += _bytes(each.members.text("size"), smallest=0)
    main = main or _DEFAULT_MEMORY
    return max(main, backends), main + backends


_DEFAULT_MEMORY = 128 << 20


def _bytes(text: str, smallest: int = 20) -> int:
    """A size as QEMU takes it; without a unit, in units of `smallest`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return 0
    unit = found[2].upper()
    return int(float(found[1]) * 2 ** (_UNITS[unit] if unit else smallest))


def render(options: Sequence[QemuOption]) -> tuple[str, ...]:
    """The command line of options."""
    return tuple(
        word
        for each in options
        for word in (
            *((f"-{each.name}",) if each.name else ()),
            *((each.value,) if each.value is not None else ()),
        )
    )


def members_of(name: str, text: str) -> Parameters:
    """The members of an option's value. What is neither form is one member without a name."""
    implied = IMPLIED.get(name, "")
    if text.startswith("{"):
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        return (
            Parameters(value, is_json=True) if isinstance(value, dict) else Parameters({text: None})
        )
    found: dict[str, Any] = {}
    for number, part in enumerate(_parts(text)):
        key, sign, value = part.partition("=")
        if sign:
            found[key] = value
        elif number == 0 and implied:
            found[implied] = part
        else:
            found[part] = None
    return Parameters(found, implied=implied)


def _parts(text: str) -> Iterator[str]:
    """Parameters are parted by a comma; two commas are one in a value."""
    part = ""
    position = 0
    while position < len(text):
        if text.startswith(",,", position):
            part, position = f"{part},", position + 2
        elif text[position] == ",":
            yield part
            part, position = "", position + 1
        else:
            part, position = part + text[position], position + 1
    if part:
        yield part


def escaped(value: str) -> str:
    """A value as it stands in a list of members."""
    return value.replace(",", ",,")
