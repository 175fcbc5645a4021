# SPDX-License-Identifier: Apache-2.0
"""The block graph as it is, with the filters that QEMU hides.

`query-block` passes over the filters that jobs such as a mirror put below a device by themselves, so
it does not tell where a device really sits. The debugging command for the graph does. Must not know
what the nodes are for.
"""

from collections.abc import Iterator

from qmpbackup.plan.commands import Command
from qmpbackup.qemu.inventory import device_path
from qmpbackup.qemu.monitor import Monitor
from qmpbackup.qemu.reply import Reply, objects


def active_nodes(monitor: Monitor) -> dict[str, str]:
    """The node that each guest device sits on, by the device's QOM path."""
    # A device's place has the drive's name, else the device's id or path (block/block-backend.c).
    roots = {
        device_path(parent): child for parent, kind, child in _edges(monitor) if kind == "root"
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
    return {parent: child for parent, kind, child in _edges(monitor) if kind == "file"}


def _edges(monitor: Monitor) -> Iterator[tuple[str, str, str]]:
    graph = Reply(monitor.execute(Command("x-debug-query-block-graph")), "block graph")
    names = {item.integer("id"): item.text("name") for item in graph.objects("nodes")}
    for edge in graph.objects("edges"):
        parent, child = edge.integer("parent"), edge.integer("child")
        if parent in names and child in names:
            yield names[parent], edge.text("name"), names[child]
