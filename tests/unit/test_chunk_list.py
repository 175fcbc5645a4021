# SPDX-License-Identifier: Apache-2.0
"""The list of chunks of a disk: long runs of one id cost no more than a look."""

from hypothesis import given
from hypothesis import strategies as st

from qmpbackup.targets.repository.chunk_list import CHUNK, ID, ChunkList

RUNS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3000)), max_size=6)


@given(RUNS)
def test_no_id_is_passed_over_and_a_run_comes_once_in_a_while(
    runs: list[tuple[int, int]],
) -> None:
    chunks = b"".join(bytes([byte] * ID) * count for byte, count in runs)
    listed = ChunkList(CHUNK * (len(chunks) // ID), chunks)
    found = list(listed.distinct())
    assert set(found) == set(listed.ids())
    if len({byte for byte, _ in runs}) == 1:
        assert len(found) <= -(-len(chunks) // ID // 1024)
