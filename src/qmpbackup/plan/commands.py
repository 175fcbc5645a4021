# SPDX-License-Identifier: Apache-2.0
"""QMP commands as data: what a run sends, as values one can print, compare and test.

One frozen type, and one small constructor for each command whose arguments need thought. Names and
members are those of QEMU's QAPI schema (docs/interop/qemu-qmp-ref).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

BITMAP_GRANULARITY = 65536
"""Bytes a bit stands for: one qcow2 cluster of the target, so a bit never copies half a cluster."""


@dataclass(frozen=True, slots=True)
class Command:
    """One QMP command with its arguments."""

    name: str
    arguments: Mapping[str, Json] = field(default_factory=dict)

    def render(self) -> dict[str, Json]:
        """The form that goes over the wire and into `--dry-run`."""
        return {"execute": self.name, "arguments": self.arguments}


def bitmap_add(
    node: str,
    name: str,
    *,
    persistent: bool = False,
    disabled: bool = False,
    granularity: int = BITMAP_GRANULARITY,
) -> Command:
    """Start a bitmap; `disabled` ones take merges but record no guest write.

    A merge into a bitmap of coarser `granularity` widens the marks to its blocks.
    """
    arguments: dict[str, Json] = {
        "node": node,
        "name": name,
        "granularity": granularity,
        "persistent": persistent,
    }
    if disabled:
        arguments["disabled"] = True
    return Command("block-dirty-bitmap-add", arguments)


def bitmap_merge(node: str, target: str, source_node: str, source: str) -> Command:
    """Add the marks of one bitmap to another, possibly on another node of the same size."""
    return Command(
        "block-dirty-bitmap-merge",
        {"node": node, "target": target, "bitmaps": [{"node": source_node, "name": source}]},
    )


def bitmap_remove(node: str, name: str) -> Command:
    """Remove a bitmap, also from its image if it is persistent."""
    return Command("block-dirty-bitmap-remove", {"node": node, "name": name})


def bitmap_disable(node: str, name: str) -> Command:
    """Have a bitmap record no more."""
    return Command("block-dirty-bitmap-disable", {"node": node, "name": name})


def transaction(commands: Sequence[Command]) -> Command:
    """All of the commands or none of them (QMP `transaction`)."""
    return Command(
        "transaction",
        {"actions": [{"type": command.name, "data": command.arguments} for command in commands]},
    )


def blockdev_add(node: str, driver: str, **options: Json) -> Command:
    """Add a node; option names are written with `_` for `-`, apart from dotted ones."""
    return Command("blockdev-add", {"driver": driver, "node-name": node, **_dashed(options)})


def blockdev_del(node: str) -> Command:
    """Remove a node that nothing uses."""
    return Command("blockdev-del", {"node-name": node})


def export_add(
    name: str,
    node: str,
    *,
    bitmaps: Sequence[str] = (),
    writable: bool = False,
    allocation_depth: bool = False,
) -> Command:
    """Show a node over NBD, under the name that the export has in QEMU as well."""
    return Command(
        "block-export-add",
        {
            "type": "nbd",
            "id": name,
            "name": name,
            "node-name": node,
            "writable": writable,
            "bitmaps": list(bitmaps),
            "allocation-depth": allocation_depth,
        },
    )


def attach(qom_path: str, node: str) -> Command:
    """Put a guest device on another node. Never to the one it is on: QEMU 7.2 dies of it."""
    return Command("qom-set", {"path": qom_path, "property": "drive", "value": node})


def _dashed(options: Mapping[str, Json]) -> dict[str, Json]:
    return {name.replace("_", "-"): value for name, value in options.items()}
