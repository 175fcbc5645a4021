# SPDX-License-Identifier: Apache-2.0
"""The block graph as it is, with the filters that QEMU hides, and who may write where.

`query-block` passes over the filters that jobs such as a mirror put below a device by themselves, so
it does not tell where a device really sits. The debugging command for the graph does, and it tells
what each user of a node may do and lets others do (QEMU include/block/block-common.h, BLK_PERM_*).
Must not know what the nodes are for.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from qmpbackup.errors import VmError
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import Reply, objects
from qmpbackup.plan.commands import Command

QUESTION = Command("x-debug-query-block-graph")
PERIPHERAL = "/machine/peripheral/"
WRITE = "write"

FILTERS = frozenset({"throttle", "copy-on-read", "copy-before-write", "compress", "preallocate"})
"""Filter drivers of QEMU that may sit between a device and its format node."""

OF_JOBS = frozenset({"commit_top", "mirror_top"})
"""Filters that jobs put in place by themselves."""


def device_path(qdev: str) -> str:
    """The QOM path of the device whose `drive` property a `query-block` entry names.

    Devices with an id are named by it, others by their path; virtio devices by their inner half.
    """
    if not qdev.startswith("/"):
        return f"{PERIPHERAL}{qdev}"
    return qdev.removesuffix("/virtio-backend")


@dataclass(frozen=True, slots=True)
class Edge:
    """A user of a node, and the node. `kind` is the node's part for its user (`file`, `backing`, …)."""

    parent: str
    of_node: bool
    kind: str
    child: str
    does: frozenset[str]
    shares: frozenset[str]


@dataclass(frozen=True)
class Graph:
    """All users of all nodes."""

    edges: tuple[Edge, ...]

    @classmethod
    def of(cls, reply: object) -> "Graph":
        """The graph that QEMU has answered with."""
        graph = Reply(reply, "block graph")
        names, nodes = {}, set()
        for item in graph.objects("nodes"):
            number = item.integer("id")
            names[number] = item.text("name")
            if item.text("type") == "block-driver":
                nodes.add(number)
        edges = (
            (edge.integer("parent"), edge, edge.integer("child")) for edge in graph.objects("edges")
        )
        return cls(
            tuple(
                Edge(
                    parent=names[parent],
                    of_node=parent in nodes,
                    kind=edge.text("name"),
                    child=names[child],
                    does=frozenset(edge.texts("perm")),
                    shares=frozenset(edge.texts("shared-perm")),
                )
                for parent, edge, child in edges
                if parent in names and child in nodes
            )
        )

    @cached_property
    def _children(self) -> Mapping[str, tuple[Edge, ...]]:
        found: dict[str, list[Edge]] = {}
        for edge in self.edges:
            if edge.of_node:
                found.setdefault(edge.parent, []).append(edge)
        return {parent: tuple(edges) for parent, edges in found.items()}

    def children(self, node: str) -> tuple[Edge, ...]:
        """The edges to the nodes that a node uses."""
        return self._children.get(node, ())

    def child(self, node: str, kind: str = "file") -> str | None:
        """The node that plays this part for a node."""
        return next((edge.child for edge in self.children(node) if edge.kind == kind), None)

    def users(self, node: str) -> Iterator[Edge]:
        """The edges of all that use a node."""
        return (edge for edge in self.edges if edge.child == node)

    def under(self, node: str, but: Collection[str] = ()) -> Iterator[str]:
        """The node and all below it, each once; parts in `but` are not followed."""
        seen: set[str] = set()
        left = [node]
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                yield name
                left += [edge.child for edge in self.children(name) if edge.kind not in but]

    def below(self, node: str, nodes: Mapping[str, Reply], passes: Callable[[Reply], bool]) -> str:
        """The first node from `node` downwards that `passes` does not hold for."""
        for _ in range(len(nodes) + 1):
            reply = nodes.get(node)
            child = self.child(node) if reply is not None and passes(reply) else None
            if child is None:
                return node
            node = child
        raise VmError("The block graph that QEMU shows has a circle.")


def active_nodes(monitor: Monitor) -> dict[str, str]:
    """The node that each guest device sits on, by the device's QOM path."""
    # A device's place has the drive's name, else the device's id or path (block/block-backend.c).
    roots = {
        device_path(edge.parent): edge.child for edge in _edges(monitor) if edge.kind == "root"
    }
    drives = objects(monitor.execute(Command("query-block")), "query-block")
    places = {}
    for drive in drives:
        inserted = drive.optional("inserted")
        if "qdev" in drive and inserted is not None:
            path = device_path(drive.text("qdev"))
            named = device_path(drive.text("device", "") or path)
            places[path] = roots.get(named) or inserted.text("node-name")
    return places


def children(monitor: Monitor) -> dict[str, str]:
    """The node below each filter, by the filter's name."""
    return {edge.parent: edge.child for edge in _edges(monitor) if edge.kind == "file"}


def _edges(monitor: Monitor) -> tuple[Edge, ...]:
    return Graph.of(monitor.execute(QUESTION)).edges
