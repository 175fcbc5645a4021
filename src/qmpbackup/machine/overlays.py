# SPDX-License-Identifier: Apache-2.0
"""Overlays that somebody put on top of a filter of ours: an external snapshot during a backup.

The filter is then the overlay's backing node, and QEMU has written the filter's name into the new
image as the format of its backing file, with which no later QEMU would open it. So the overlay gets
the node below the filter as its backing node (QMP `blockdev-reopen`), and its image the right format
(`change-backing-file`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qmpbackup.errors import VmError
from qmpbackup.machine.graph import QUESTION, Graph
from qmpbackup.machine.monitor import Monitor
from qmpbackup.machine.reply import objects
from qmpbackup.plan.commands import Command


@dataclass(frozen=True)
class _Overlay:
    """A node above a filter of ours, and what it takes to open it anew.

    `root` is the topmost node of its chain; `base` the node below the filter.
    """

    node: str
    driver: str
    file: str
    root: str
    base: str
    base_driver: str
    backing_name: str


def release(monitor: Monitor, ours: Callable[[str], bool]) -> Iterator[str]:
    """Take filters of ours out of the chains of overlays; yields a clause for each done.

    Raises:
        VmError: QEMU refused.
    """
    for overlay in _overlays(monitor, ours):
        options = {
            "driver": overlay.driver,
            "node-name": overlay.node,
            "file": overlay.file,
            "backing": overlay.base,
        }
        monitor.execute(Command("blockdev-reopen", {"options": [options]}))
        # QEMU writes the overlay's own format as that of its backing file, so this is right only
        # where both are alike; else the owner has to say it.
        if overlay.base_driver == overlay.driver:
            monitor.execute(
                Command(
                    "change-backing-file",
                    {
                        "device": overlay.root,
                        "image-node-name": overlay.node,
                        "backing-file": overlay.backing_name,
                    },
                )
            )
            yield f"took our filter out from below the snapshot {overlay.node}"
        else:
            yield (
                f"took our filter out from below the snapshot {overlay.node}; before the VM is "
                f"started again, its image needs `qemu-img rebase -u -F {overlay.base_driver} "
                f"-b {overlay.backing_name}`"
            )


def _overlays(monitor: Monitor, ours: Callable[[str], bool]) -> Iterator[_Overlay]:
    graph = Graph.of(monitor.execute(QUESTION))
    links = [edge for edge in graph.edges if edge.of_node and edge.kind == "backing"]
    above = {edge.child: edge.parent for edge in links}
    found = monitor.execute(Command("query-named-block-nodes", {"flat": True}))
    nodes = {node.text("node-name"): node for node in objects(found, "query-named-block-nodes")}
    for edge in links:
        node, ours_below = edge.parent, edge.child
        if ours(ours_below) and not ours(node) and node in nodes:
            base = _file_of(graph, ours_below)
            yield _Overlay(
                node=node,
                driver=nodes[node].text("drv"),
                file=_file_of(graph, node),
                root=_top(node, above),
                base=base,
                base_driver=nodes[base].text("drv"),
                backing_name=nodes[node].nested("image").text("backing-filename"),
            )


def _file_of(graph: Graph, node: str) -> str:
    child = graph.child(node)
    if child is None:
        raise VmError(f"The node {node} that QEMU shows has nothing below it.")
    return child


def _top(node: str, above: dict[str, str]) -> str:
    """The topmost overlay of a chain."""
    for _ in range(len(above)):
        node = above.get(node, node)
    return node
