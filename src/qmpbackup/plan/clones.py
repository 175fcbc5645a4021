# SPDX-License-Identifier: Apache-2.0
"""Several VMs with one UUID in one list of points, told from one that was renamed or moved. Pure.

A clone whose UUID nobody has changed is the same VM to us as to its managers. What tells is that
such VMs take turns: one that was renamed or moved rarely goes back, and if it does (a migration to and
fro), it takes its change bitmaps along, so its points are no fulls.
"""

from collections.abc import Sequence

from qmpbackup.model import Level, Point, VmIdentity

TODO = "Give each VM a UUID of its own (-uuid), or a target of its own."


def others_with_uuid(points: Sequence[Point], vm: VmIdentity) -> str:
    """Why another VM seems to make points as this one, as a clause; empty if none does.

    `points` are those of the VM, oldest first.
    """
    turns = [index for index, point in enumerate(points) if not _is_called(point, vm)]
    if not vm.uuid or not turns:
        return ""
    other = points[turns[-1]]
    before = [index for index in range(turns[-1]) if _is_called(points[index], vm)]
    if not before:
        return ""
    first = points[before[-1] + 1]
    moved = first.vm.identity.name == vm.name and not _is_full(first)
    if moved:
        return ""
    return (
        f"points of {_called(vm)} and of {_called(other.vm.identity)} take turns under the UUID "
        f"{vm.uuid}, as those of clones do: each one's next point is a full, and `prune` takes them for "
        "points of one VM"
    )


def _is_called(point: Point, vm: VmIdentity) -> bool:
    """Whether a point was made of a VM of this name on this host; a host that is not known is any."""
    made = point.vm.identity
    return made.name == vm.name and (made.host == vm.host or not made.host or not vm.host)


def _is_full(point: Point) -> bool:
    return all(disk.level in {Level.FULL, Level.COPY} for disk in point.disks)


def _called(vm: VmIdentity) -> str:
    return f"{vm.name or vm.address or 'a VM without a name'} on {vm.host or 'an unknown host'}"
