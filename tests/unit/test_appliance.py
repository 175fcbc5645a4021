# SPDX-License-Identifier: Apache-2.0
"""The appliance's parts: what it is made of, and the talk with it, by a stand-in for what runs inside."""

import io
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpbackup.errors import VmError
from qmpbackup.machine.appliance import modules
from qmpbackup.machine.appliance.initramfs import Initramfs
from qmpbackup.machine.appliance.running import End, GuestAgent
from qmpbackup.process import Child

Talk = Callable[[socket.socket, bytes], None]


@contextmanager
def talking(talk: Talk) -> Iterator[GuestAgent]:
    """An agent that does this for a question, given the mark of its answer, and is gone then."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with theirs:
            line = b""
            while not line.endswith(b"\n"):
                line += theirs.recv(4096)
            talk(theirs, line.split(b" ")[1])

    thread = threading.Thread(target=answer)
    with ours, Child(["true"]) as child:
        thread.start()
        yield GuestAgent(ours, child)
    thread.join()


def test_an_answer_ends_with_its_mark_wherever_it_is_split() -> None:
    def talk(port: socket.socket, mark: bytes) -> None:
        for byte in b"data" + mark[:-1] + b"no data" + mark + b"3 it failed \n":
            port.send(bytes([byte]))

    with talking(talk) as agent:
        said, end = agent.told("list", "/a b")
    assert said.startswith(b"data")
    assert said.endswith(b"data")
    assert end == End(3, "it failed")


def test_what_was_not_read_of_an_answer_is_passed_over() -> None:
    def talk(port: socket.socket, mark: bytes) -> None:
        port.sendall(b"long" * 1000 + mark + b"0 \n")
        second = b""
        while not second.endswith(b"\n"):
            second += port.recv(4096)
        port.sendall(b"short" + second.split(b" ")[1] + b"1 \n")

    with talking(talk) as agent:
        next(iter(agent.ask("archive")))
        assert agent.told("is_there") == (b"short", End(1, ""))


def test_an_answer_may_be_empty() -> None:
    with talking(lambda port, mark: port.sendall(mark + b"0 \n")) as agent:
        assert agent.told("scan") == (b"", End(0, ""))


@pytest.mark.parametrize(
    "talk",
    [
        lambda port, _: port.sendall(b"half an answer"),
        lambda port, mark: port.sendall(mark + b"0 no line feed"),
        lambda port, mark: port.sendall(mark + b"well\n"),
        lambda port, mark: port.sendall(mark + b"0" * 20000 + b"\n"),
        lambda _port, _mark: None,
    ],
)
def test_an_end_that_is_none_is_an_error(talk: Talk) -> None:
    with talking(talk) as agent, pytest.raises(VmError):
        agent.told("scan")


def test_an_endless_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmpbackup.machine.appliance.running._LARGEST_ANSWER", 1000)
    endless = talking(lambda port, _: port.sendall(b"x" * 5000))
    with endless as agent, pytest.raises(VmError, match="without end"):
        agent.told("scan")


def test_silence_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmpbackup.machine.appliance.running._SILENCE_SECONDS", 0.0)
    over = threading.Event()

    def wait(_port: socket.socket, _mark: bytes) -> None:
        over.wait()

    with talking(wait) as agent:
        with pytest.raises(VmError, match="says nothing"):
            agent.told("scan")
        over.set()


def test_an_initramfs_is_what_cpio_reads(tmp_path: Path) -> None:
    file = io.BytesIO()
    archive = Initramfs(file)
    archive.file("bin/deep/tool", b"#!tool", 0o755)
    archive.file("bin/deep/tool", b"another")
    archive.link("bin/link", "deep/tool")
    archive.folder("dev")
    archive.end()
    subprocess.run(["cpio", "-i", "--quiet"], input=file.getvalue(), cwd=tmp_path, check=True)
    assert (tmp_path / "bin/link").read_bytes() == b"#!tool"
    assert (tmp_path / "bin/deep/tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "dev").is_dir()


def module(folder: Path, name: str, needs: str, *aliases: str) -> None:
    """A file that says of itself what a module says."""
    said = [f"depends={needs}", *(f"alias={each}" for each in aliases), "license=GPL"]
    (folder / f"{name}.ko").write_bytes(b"\x7fELF\0" + "\0".join([*said, ""]).encode())


def test_modules_come_with_what_they_need(tmp_path: Path) -> None:
    module(tmp_path, "dm-thin-pool", "dm-mod,dm-bufio", "dm-thin")
    module(tmp_path, "dm-bufio", "dm-mod")
    module(tmp_path, "dm-mod", "")
    module(tmp_path, "other", "")
    chosen = modules.chosen(tmp_path, ["dm_thin_pool", "part_of_the_kernel"])
    assert [each.name for each in chosen] == ["dm_mod", "dm_bufio", "dm_thin_pool"]
    tables = modules.tables(chosen)
    assert b"dm_thin_pool.ko: dm_bufio.ko dm_mod.ko\n" in tables["modules.dep"]
    assert tables["modules.alias"] == b"alias dm-thin dm_thin_pool\n"
