# SPDX-License-Identifier: Apache-2.0
"""A libvirt daemon for the tests of a file, and VMs of its."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lab.disks import MIB, Disk, create, pattern
from lab.libvirt import Bus, CannotStart, Libvirt, Managed

REQUIRED = "QMPBACKUP_TEST_LIBVIRT"
"""Set to anything, it makes a failure of what is skipped otherwise: that no libvirt can be started."""

SIZE = 16 * MIB
VDA, VDB = "virtio-disk0", "virtio-disk1"
SDA, SDB = "scsi0-0-0-0", "scsi0-0-0-1"
IDS: dict[Bus, tuple[str, str]] = {"virtio": (VDA, VDB), "scsi": (SDA, SDB)}


@contextmanager
def started(name: str = "") -> Iterator[Libvirt]:
    """A daemon, on a host of this name, or the test is skipped."""
    with ExitStack() as stack:
        try:
            daemon = stack.enter_context(Libvirt(name))
        except CannotStart as error:
            if os.environ.get(REQUIRED):
                raise
            pytest.skip(str(error))
        yield daemon


@pytest.fixture(scope="module")
def host() -> Iterator[Libvirt]:
    """A daemon."""
    with started() as daemon:
        yield daemon


@pytest.fixture
def start_managed(host: Libvirt) -> Iterator[Callable[..., Managed]]:
    """Starts VMs of libvirt's that are gone after the test: `vm = start_managed("name")`."""
    with ExitStack() as stack:
        yield lambda name, **options: stack.enter_context(managed(host, name, **options))


@contextmanager
def managed(
    host: Libvirt, name: str, bus: Bus = "virtio", ids: tuple[str, str] | None = None
) -> Iterator[Managed]:
    """A running VM with two disks that hold something."""
    disks = [
        Disk(disk, create(host.images / f"{name}-{disk}", SIZE, contents=pattern(SIZE, seed)))
        for seed, disk in enumerate(ids or IDS[bus])
    ]
    vm = Managed(host, name, disks, bus)
    vm.define()
    vm.start()
    try:
        yield vm
    finally:
        vm.leave()
        host.try_virsh("destroy", name)
        host.try_virsh("undefine", name, "--managed-save", "--snapshots-metadata")
        for image in host.images.glob(f"{name}-*"):
            image.unlink()
