# SPDX-License-Identifier: Apache-2.0
"""What is served unproved is proved meanwhile: whatever becomes of that is told at the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from qmpbackup.errors import QmpBackupError, StorageError
from qmpbackup.images.times import Stamp
from qmpbackup.nbd.server import Server
from qmpbackup.service import serve
from qmpbackup.targets.stored_image import OpenDisks, Unproved


class Files(Unproved):
    """Files that are read with the results that a test gives, one after the other; the last stays."""

    def __init__(self, *results: Exception | None) -> None:
        self.results, self.read, self.writes = list(results), 0, 0

    def stamps(self) -> tuple[Stamp, ...]:
        return cast("tuple[Stamp, ...]", (self.writes,))

    def prove(self, each: Callable[[], None]) -> None:
        self.read += 1
        each()
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        if result is not None:
            raise result


class Withdrawing:
    """Stands for the server."""

    def __init__(self) -> None:
        self.withdrawn: list[str] = []

    def withdraw(self, disk_id: str) -> None:
        self.withdrawn.append(disk_id)


@contextmanager
def proving(server: Withdrawing, **files: Files) -> Iterator[serve._Proof]:
    proof = serve._Proof(OpenDisks({}, files), cast("Server", server))
    proof.start()
    try:
        yield proof
    finally:
        proof.end()


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


def ended(proof: serve._Proof) -> QmpBackupError | None:
    proof.end()
    return proof.damage


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_LOOK_SECONDS", 0.001)


def test_files_that_cannot_be_read_at_once_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_AGAIN_SECONDS", 0.0)
    vda = Files(StorageError("It answers 503."), None)
    with proving(Withdrawing(), vda=vda) as proof:
        until(lambda: vda.read == 2)
        assert ended(proof) is None


def test_what_was_never_proved_is_said_at_the_end() -> None:
    vda, server = Files(StorageError("It answers 503.")), Withdrawing()
    with proving(server, vda=vda) as proof:
        until(lambda: vda.read == 1)
        damage = ended(proof)
    assert "vda was served unproved: It answers 503." in str(damage)
    assert (vda.read, server.withdrawn) == (1, [])


def test_a_disk_that_was_written_to_is_told_though_another_is_being_proved() -> None:
    vda, vdb = Files(None), Files(None)

    def holds(each: Callable[[], None]) -> None:
        vda.writes += 1
        while True:
            each()

    vdb.prove = holds  # type: ignore[method-assign]
    with proving(Withdrawing(), vda=vda, vdb=vdb) as proof:
        until(lambda: vda.writes == 1)
        assert "Somebody wrote to the files of disk vda" in str(ended(proof))


def test_a_proof_that_fails_in_any_way_leaves_nothing_served() -> None:
    server = Withdrawing()
    with proving(server, vda=Files(MemoryError()), vdb=Files(None)) as proof:
        proof.join()
    assert server.withdrawn == ["vda", "vdb"]
    assert "its proof failed" in str(proof.damage)
