# SPDX-License-Identifier: Apache-2.0
"""What doctor tells by names alone."""

import pytest

from qmpbackup.service.doctor import is_reached_over_a_network


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("nbd://host/disk", True),
        ("nbd+unix:///disk?socket=/run/s", True),
        ("rbd:pool/image", True),
        ('json:{"driver": "qcow2", "file": {"driver": "nbd", "server.path": "/run/s"}}', True),
        ("/images/nbd/disk.qcow2", False),
        ("/dev/vg/disk", False),
        ('json:{"driver": "raw", "file": {"driver": "file", "filename": "/nbd"}}', False),
    ],
)
def test_images_behind_servers(filename: str, expected: bool) -> None:
    assert is_reached_over_a_network(filename) is expected
