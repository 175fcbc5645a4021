# SPDX-License-Identifier: Apache-2.0
"""Which files of the host a VM's disks lie in, down to the last backing file.

Knows the block graph; must not know what anybody wants with the files. Paths are what QEMU says, and
QEMU may see other file systems than we do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmpbackup.machine.reply import Reply, objects
from qmpbackup.plan.commands import Command

if TYPE_CHECKING:  # who restores needs no monitor, which takes a fifth of the start of a program
    from qmpbackup.machine.monitor import Monitor

_OF_THE_IMAGE = frozenset({"file", "data-file"})
_LINKS = _OF_THE_IMAGE | {"backing"}
"""The edges of the graph that lead to where data lies, and not to where a filter copies it."""


@dataclass(frozen=True, slots=True)
class HostFile:
    """A file or device below a disk.

    `driver` is QEMU's, such as `file`, `host_device` or `nbd`. `written` says whether what the guest
    writes goes there, as opposed to backing files. `allocated` is QEMU's answer, 0 for none.
    `holds_snapshots` says that an image above has internal snapshots, whose data lie there as well.
    """

    driver: str
    path: Path
    written: bool
    allocated: int
    holds_snapshots: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is a file of a file system of the host."""
        return self.driver == "file" and self.path.is_absolute()


def below(monitor: "Monitor", tops: Iterable[str]) -> dict[str, tuple[HostFile, ...]]:
    """The files below each of these nodes.

    Raises:
        VmError: QEMU refused, or answers what cannot be understood.
    """
    found, graph = monitor.execute_all(
        [Command("query-named-block-nodes", {"flat": True}), Command("x-debug-query-block-graph")]
    )
    nodes = {node.text("node-name"): node for node in objects(found, "query-named-block-nodes")}
    links = _links(Reply(graph, "block graph"))
    return {top: tuple(_walk(top, nodes, links).values()) for top in tops}


def _links(graph: Reply) -> dict[str, list[tuple[str, str]]]:
    names = {item.integer("id"): item.text("name") for item in graph.objects("nodes")}
    links: dict[str, list[tuple[str, str]]] = {}
    for edge in graph.objects("edges"):
        parent, child, kind = edge.integer("parent"), edge.integer("child"), edge.text("name")
        if kind in _LINKS and parent in names and child in names:
            links.setdefault(names[parent], []).append((kind, names[child]))
    return links


def _walk(
    top: str, nodes: Mapping[str, Reply], links: Mapping[str, list[tuple[str, str]]]
) -> dict[str, HostFile]:
    found: dict[str, HostFile] = {}
    ahead, seen = [(top, True, False)], set[str]()
    while ahead:
        name, written, snapshots = ahead.pop()
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        node = nodes[name]
        snapshots = snapshots or any(True for _ in node.nested("image").objects("snapshots"))
        below_it = links.get(name, [])
        if not below_it:
            found[name] = replace(_file(node), written=written, holds_snapshots=snapshots)
        ahead += [(child, written and kind != "backing", snapshots) for kind, child in below_it]
    return found


def _file(node: Reply) -> HostFile:
    image = node.nested("image")
    return HostFile(
        driver=node.text("drv"),
        path=Path(image.text("filename", "")),
        written=True,
        allocated=image.integer("actual-size", 0),
    )
