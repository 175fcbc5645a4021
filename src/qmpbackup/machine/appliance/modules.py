# SPDX-License-Identifier: Apache-2.0
"""Modules of a kernel with what they need, and the tables by which modprobe finds them.

depmod makes those tables, but not every host has it; a module says all of it itself (`.modinfo`).
"""

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_COMPRESSIONS = (".xz", ".zst")


@dataclass(frozen=True, slots=True)
class Module:
    """A module: its contents, and what it says of itself."""

    name: str
    data: bytes
    needs: tuple[str, ...]
    aliases: tuple[str, ...]


def chosen(folder: Path, wanted: Iterable[str]) -> list[Module]:
    """These modules and all that they need, those that are needed first; those that a kernel does not
    have as modules are part of it, or it knows nothing of them."""
    files = {_name(path): path for path in folder.glob("**/*.ko*")}
    found: dict[str, Module] = {}

    def take(name: str) -> None:
        if name in found or name not in files:
            return
        module = _read(name, files[name])
        for each in module.needs:
            take(each)
        found[name] = module

    for each in wanted:
        take(each)
    return list(found.values())


def tables(modules: Iterable[Module]) -> dict[str, bytes]:
    """`modules.dep` and `modules.alias` (depmod(8))."""
    listed = list(modules)
    lines = [
        f"{each.name}.ko:{''.join(f' {n}.ko' for n in _all_needs(each, listed))}" for each in listed
    ]
    aliases = [f"alias {alias} {each.name}" for each in listed for alias in each.aliases]
    return {
        "modules.dep": "\n".join([*lines, ""]).encode(),
        "modules.alias": "\n".join([*aliases, ""]).encode(),
    }


def _all_needs(module: Module, listed: list[Module]) -> list[str]:
    """What must be there before a module, the nearest first."""
    by_name = {each.name: each for each in listed}
    found: list[str] = []
    waiting = list(module.needs)
    while waiting:
        name = waiting.pop(0)
        if name in by_name:
            found = [*(each for each in found if each != name), name]
            waiting += by_name[name].needs
    return found


def _name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _read(name: str, path: Path) -> Module:
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    elif path.suffix == ".zst":
        import zstandard

        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            data = reader.read()
    said = [
        each.partition(b"=")
        for each in data.split(b"\0")
        if each.startswith((b"depends=", b"alias="))
    ]
    needs = [
        name for key, _, value in said if key == b"depends" for name in value.decode().split(",")
    ]
    aliases = [value.decode() for key, _, value in said if key == b"alias"]
    return Module(
        name, data, tuple(each.replace("-", "_") for each in needs if each), tuple(aliases)
    )
