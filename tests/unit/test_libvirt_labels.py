# SPDX-License-Identifier: Apache-2.0
"""libvirt's names for disks come from the file that it keeps about a running VM, or from nowhere."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpbackup.machine.libvirt import labels, with_labels
from qmpbackup.model import Disk

PID = os.getpid()
STATUS = """<!-- a comment -->
<domstatus state='running' pid='{pid}'>{more}
  <domain type='qemu'>
    <devices>
      <disk><source file='/a'/><target dev='{target}' bus='virtio'/><alias name='virtio-disk0'/></disk>
      <disk><target dev='sdb' bus='scsi'/><alias name='ua-data'/></disk>
      <disk><alias name='nothing'/></disk>
    </devices>
  </domain>
</domstatus>
"""


@pytest.fixture
def status(tmp_path: Path) -> Iterator[Path]:
    """The path of the file about the VM, while the other file is held open as QEMU does."""
    with (tmp_path / "web.server.pid").open("w"):
        yield tmp_path / "web.server.xml"


def write(
    path: Path, pid: int = PID, target: str = "vda", more: str = "", before: str = ""
) -> None:
    path.write_text(before + STATUS.format(pid=pid, target=target, more=more))


def disk(name: str, *aliases: str) -> Disk:
    return Disk(name, "", "", "n", "n", "qcow2", 1, "f", can_persist=True, aliases=aliases)


def test_targets_by_the_ids_of_devices(status: Path) -> None:
    write(status)
    assert labels(PID) == {"virtio-disk0": "vda", "ua-data": "sdb"}
    disks = (disk("virtio-disk0", "virtio-disk0"), disk("ua-data", "ua-data"), disk("x", "x"))
    assert [each.label for each in with_labels(disks, PID)] == ["vda", "sdb", ""]


def test_no_file_and_no_process(status: Path) -> None:
    assert not status.exists()
    assert labels(PID) == {}
    assert labels(2**22 + 1) == {}
    assert [each.label for each in with_labels([disk("virtio-disk0")], None)] == [""]


def test_a_name_that_another_disk_has_is_not_given_twice(status: Path) -> None:
    write(status)
    disks = (disk("virtio-disk0", "virtio-disk0"), disk("vda", "vda"))
    assert [each.label for each in with_labels(disks, PID)] == ["", ""]


@pytest.mark.parametrize(
    "options",
    [
        {"pid": PID + 1},
        {"before": "<!DOCTYPE x [<!ENTITY e 'x'>]>"},
        {"more": f"<!--{'x' * 1024 * 1024}-->"},
        {"before": "no XML"},
        {"before": '<?xml version="1.0" encoding="shift_jis"?>'},
        {"before": '<?xml version="1.0" encoding="none"?>'},
    ],
    ids=["of another process", "entities", "too large", "no XML", "many bytes", "no encoding"],
)
def test_a_file_that_is_not_as_it_should_be(status: Path, options: dict[str, object]) -> None:
    write(status, **options)  # type: ignore[arg-type]
    assert labels(PID) == {}


@pytest.mark.parametrize("target", ["", "../x", "v" * 60, "vd\u0430", "vda vdb"])
def test_a_name_that_is_none(status: Path, target: str) -> None:
    write(status, target=target)
    assert labels(PID) == {"ua-data": "sdb"}


def test_no_file_but_a_link_a_pipe_or_a_folder(status: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere")
    status.symlink_to(tmp_path / "elsewhere")
    assert labels(PID) == {}
    status.unlink()
    os.mkfifo(status)
    assert labels(PID) == {}
    status.unlink()
    status.mkdir()
    assert labels(PID) == {}
