# SPDX-License-Identifier: Apache-2.0
"""Which way a view is read, and what maps of chunks say."""

import pytest

from qmpbackup.machine.pull import Method, method
from qmpbackup.model import Vm, VmConfig, VmIdentity
from qmpbackup.plan.chunk_map import runs


@pytest.mark.parametrize(
    ("version", "plain", "with_iothreads"),
    [
        ((7, 1, 0), Method.V2, Method.STAGED),
        ((7, 2, 22), Method.V2, Method.STAGED),
        ((8, 0, 0), Method.V1, Method.STAGED),
        ((8, 2, 9), Method.V1, Method.STAGED),
        ((9, 0, 0), Method.V1, Method.V1),
        ((10, 0, 13), Method.V1, Method.V1),
    ],
)
def test_the_way_depends_on_version_and_iothreads(
    version: tuple[int, int, int], plain: Method, with_iothreads: Method
) -> None:
    found = [
        method(Vm(VmConfig(VmIdentity(), ""), version, "running", True, iothreads, ()))
        for iothreads in (False, True)
    ]
    assert found == [plain, with_iothreads]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        (b"", []),
        (b"\0\0", []),
        (b"\1\1", [(0, 2)]),
        (b"\0\1\1\0\1", [(1, 2), (4, 1)]),
        (b"\1\0\0\1\0", [(0, 1), (3, 1)]),
    ],
)
def test_runs_of_marked_chunks(chunks: bytes, expected: list[tuple[int, int]]) -> None:
    assert list(runs(chunks, 1)) == expected
