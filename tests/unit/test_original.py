# SPDX-License-Identifier: Apache-2.0
"""Whether the VM of a point may still run: only who is sure that it does not, boots its point."""

import fcntl
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.patience import PATIENCE
from lab.scripted import FakeMonitor, ScriptedServer
from qmpbackup.model import VmIdentity
from qmpbackup.service.boot_original import Signs, signs_of


@pytest.fixture
def path() -> Iterator[Path]:
    """Where its monitor was; a path that is short enough."""
    with tempfile.TemporaryDirectory(prefix="qmpb-") as folder:
        yield Path(folder) / "qmp"


def seen(path: Path, *images: tuple[str, str], host: str = "", patience: float = PATIENCE) -> Signs:
    """The signs of a VM of this host."""
    host = host or socket.gethostname()
    return signs_of(VmIdentity("1-2", "vm", str(path), host), images, patience=patience)


def answering(uuid: str) -> Callable[[socket.socket], None]:
    """A monitor of a VM with such a UUID, or that says nothing any more."""
    answer = {"return": {"UUID": uuid}} if uuid else b""
    return FakeMonitor(lambda _: answer).serve


def listening(path: Path, backlog: int = 0) -> socket.socket:
    """Somebody who listens, and never accepts."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(backlog)
    return listener


def test_nothing_there_is_sure(path: Path) -> None:
    assert seen(path) == Signs()
    listening(path).close()  # as of a QEMU that was killed
    assert path.exists()
    assert seen(path) == Signs()


def test_a_point_without_an_address_tells_nothing() -> None:
    assert signs_of(VmIdentity(), ()) == Signs()


def test_an_answer_of_that_vm_and_of_another(path: Path) -> None:
    with ScriptedServer(path, answering("1-2")):
        assert "still runs" in seen(path).runs[0]
    path.unlink()
    with ScriptedServer(path, answering("3-4")):
        assert seen(path) == Signs()


def test_a_vm_that_hangs_may_run(path: Path) -> None:
    with ScriptedServer(path, answering("")):
        assert "may still run" in seen(path, patience=0.2).runs[0]


def test_a_monitor_with_a_full_queue_is_of_a_vm_that_runs(path: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(listening(path))
        assert "may still run" in seen(path, patience=0.2).runs[0]  # it does not greet
        for _ in range(2):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            try:
                waiting.connect(str(path))
            except BlockingIOError:
                break
        assert "no further connection" in seen(path, patience=0.2).runs[0]


def test_a_socket_whose_file_is_gone_is_still_held(path: Path) -> None:
    with listening(path):
        path.unlink()
        assert "whose file is gone" in seen(path).runs[0]
    assert seen(path) == Signs()


def test_what_is_no_monitor_is_unclear_and_whoever_knows_better_says_so(path: Path) -> None:
    path.write_text("a file")
    found = seen(path)
    assert not found.runs
    assert "cannot be told" in found.unclear[0]
    assert "--original-off" in found.obstacles(known_off=False)[0]
    assert found.obstacles(known_off=True) == ()
    path.unlink()
    with ScriptedServer(path, lambda client: client.sendall(b"SSH-2.0\n")):
        assert "cannot be told" in seen(path).unclear[0]
    path.unlink()
    with ScriptedServer(path, lambda _: None):
        assert "cannot be told" in seen(path).unclear[0]


def test_a_host_that_cannot_be_reached_is_unclear() -> None:
    identity = VmIdentity("1-2", "vm", "tcp:no-such-host.invalid:1", "elsewhere")
    assert "cannot be told" in signs_of(identity, ()).unclear[0]


def test_a_vm_that_is_known_off_and_answers_runs(path: Path) -> None:
    with ScriptedServer(path, answering("1-2")):
        assert seen(path).obstacles(known_off=True)


def test_images(tmp_path: Path, path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    disk = ("vda", str(image))
    assert seen(path, disk, ("vdb", "nbd://host/x"), ("vdc", "")) == Signs()
    with image.open("r+b") as opened:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 100)  # one byte, as QEMU does
        assert "in use" in seen(path, disk).runs[0]
    assert seen(path, disk, host="elsewhere") == Signs()
