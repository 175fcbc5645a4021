# SPDX-License-Identifier: Apache-2.0
"""Others write to the folder for temporary files, too: what they put there under our names is neither
followed, nor removed, nor in the way."""

import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cli
from lab.backups import leftovers
from lab.disks import CLUSTER, MIB
from stock.scene import Scene, scene

TCP = ("-qmp", "tcp:127.0.0.1:0,server=on,wait=off")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path, "repository", args=TCP) as stage:
        stage.renew("inc")
        yield stage


def address(stage: Scene, over: str) -> str:
    """The monitor of a VM, over a unix socket or TCP."""
    if over == "unix":
        return str(stage.vm.socket)
    names = [device["filename"] for device in stage.vm.qmp("query-chardev")]
    (port,) = (found[1] for name in names if (found := re.search("tcp:.*:([0-9]+),", name)))
    return f"tcp:127.0.0.1:{port}"


def killed_while_it_reads(stage: Scene, temporary: Path, over: str) -> str:
    """Have a run killed while QEMU serves it; how it called what it had."""
    for block in range(10):
        stage.vm.write("vda", block * MIB, CLUSTER, 3)
    arguments = ("--socket", address(stage, over), *stage.arguments("inc", stage.vm.socket)[2:])
    env = {**stage.environment, "TMPDIR": str(temporary)}
    with cli.start(*arguments, "--speed-limit", "10000", env=env) as running:
        stage.vm.qmp.poll(running.unless_over(lambda: bool(stage.vm.qmp("query-block-exports"))))
        names = [item["name"] for item in stage.vm.qmp("qom-list", path="/objects")]
        (run,) = (found[0] for name in names if (found := re.match("qmpbackup-[0-9a-f]{6}-", name)))
        running.signal(signal.SIGKILL)
        running.wait(60)
    return run


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_what_others_have_put_there_under_our_names(
    stage: Scene, tmp_path: Path, over: str
) -> None:
    temporary, theirs = stage.vm.folder / "tmp", tmp_path / "theirs"
    temporary.mkdir()
    theirs.mkdir()
    for name in ("nbd", "qmpbackup-nbd"):
        os.mknod(theirs / name, 0o600 | stat.S_IFSOCK)
    run = killed_while_it_reads(stage, temporary, over)
    (temporary / f"{run}file").write_text("")
    (temporary / f"{run}link").symlink_to(theirs)
    (temporary / f"{run}folder").mkdir()
    (temporary / f"{run}folder" / "x").write_text("")
    (temporary / f"{run}others").mkdir()
    os.chown(temporary / f"{run}others", 65534, 65534)
    planted = {temporary / f"{run}{what}" for what in ("file", "link", "folder", "others")}
    env = {"TMPDIR": str(temporary)}
    cli.run("--socket", stage.vm.socket, "recover", env=env).check()
    assert leftovers(stage.vm) == []
    assert set(temporary.iterdir()) == planted
    assert len(list(theirs.iterdir())) == 2
    assert stage.vm.qmp("nbd-server-start", addr=unix(stage.vm.folder / "free")) == {}
    stage.vm.qmp("nbd-server-stop")
    stage.make_good("inc")


def test_a_path_too_long_for_the_socket_that_qemu_makes(stage: Scene, tmp_path: Path) -> None:
    temporary = tmp_path / ("long" * 40)
    temporary.mkdir()
    arguments = ("--socket", address(stage, "tcp"), *stage.arguments("inc", stage.vm.socket)[2:])
    env = {**stage.environment, "TMPDIR": str(temporary)}
    refused = cli.run(*arguments, env=env).check(6)
    assert "its path is too long" in refused.err
    assert "TMPDIR" in refused.err
    assert list(temporary.iterdir()) == []
    assert leftovers(stage.vm) == []
    stage.make_good("inc")


def unix(path: Path) -> dict[str, object]:
    return {"type": "unix", "data": {"path": str(path)}}


def test_nothing_lies_there_while_a_run_reads(stage: Scene, tmp_path: Path) -> None:
    """Nor can its name be too long for a socket."""
    temporary = tmp_path / ("long" * 40)
    temporary.mkdir()
    killed_while_it_reads(stage, temporary, "unix")
    assert list(temporary.iterdir()) == []
    env = {**stage.environment, "TMPDIR": str(temporary)}
    stage.write()
    cli.run(*stage.arguments("inc", stage.vm.socket), env=env).check()
    assert leftovers(stage.vm) == []
    assert "unlink" not in stage.vm.stderr
