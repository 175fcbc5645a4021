# SPDX-License-Identifier: Apache-2.0
"""Programs that we start never outlive us, and what they say is not lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.patience import PATIENCE
from qmpbackup import interrupt, landlock
from qmpbackup.errors import Interrupted, QmpBackupError
from qmpbackup.process import Child, run


def test_output_messages_and_code_come_back() -> None:
    result = run(["sh", "-c", "echo out; echo one >&2; echo 'sh: the reason.' >&2; exit 3"])
    assert (result.code, result.output, result.reason) == (3, b"out\n", "the reason")


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(QmpBackupError, match="no-such-program is not installed"):
        run(["no-such-program"])


def test_a_program_that_hangs_is_ended() -> None:
    with pytest.raises(QmpBackupError, match="did not finish in time"):
        run(["sleep", "600"], timeout=0.2)


def test_a_program_that_floods_both_pipes_is_read_to_its_end() -> None:
    flood = "head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero; echo last >&2"
    result = run(["sh", "-c", flood])
    assert len(result.output) == 3_000_000
    assert result.reason.endswith("last")


def test_a_program_that_is_killed_says_so() -> None:
    assert "signal 9" in run(["sh", "-c", "kill -9 $$"]).reason


@pytest.mark.skipif(not landlock.is_there(), reason="a kernel without Landlock")
def test_a_program_writes_to_nothing_but_what_it_was_given(tmp_path: Path) -> None:
    given, other, folder = tmp_path / "given", tmp_path / "other", tmp_path / "folder"
    for file in (given, other):
        file.write_bytes(b"before")
    folder.mkdir()
    script = (
        f"echo a >/dev/fd/$0 && echo b >{folder}/new && echo c >/dev/null || exit 1\n"
        f"echo d >{other} && exit 2; echo e >{tmp_path}/new && exit 3\n"
        f"rm {other} && exit 4; ln -s x {tmp_path}/link && exit 5; cat {other}"
    )
    with given.open("r+b") as opened:
        place = os.open(folder, os.O_PATH)
        fds = [opened.fileno()]
        result = run(["sh", "-c", script, str(fds[0])], pass_fds=fds, writable=[*fds, place])
        os.close(place)
    assert (result.code, result.output) == (0, b"before"), result.messages
    assert given.read_bytes() == b"a\n"
    assert (folder / "new").read_bytes() == b"b\n"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "given", "other"]


def test_leaving_the_block_ends_the_program() -> None:
    with Child(["sleep", "600"]) as child:
        pid = child.pid
    assert not running(pid)


def test_a_held_signal_ends_the_wait_and_the_program() -> None:
    with interrupt.held(), Child(["sleep", "600"]) as child:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            child.wait()
        pid = child.pid
    assert not running(pid)


def test_the_program_takes_signals_even_where_we_hold_ours() -> None:
    with interrupt.held(), Child(["sleep", "600"]) as child:
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(PATIENCE).code == -signal.SIGTERM


def test_the_program_dies_with_us() -> None:
    """Its pipe closes when it is gone, whoever has become its parent by then."""
    import qmpbackup

    code = (
        "import os\nfrom qmpbackup.process import Child\n"
        "with Child(['sleep', '600'], pass_fds=[1]) as child:\n"
        "    print(child.pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(qmpbackup.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert process.wait(PATIENCE) == -signal.SIGKILL
        assert gone(pid)


def running(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pid: int) -> bool:
    """Wait for the end of a process that is not our child."""
    import select

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return bool(poller.poll(20_000))
    finally:
        os.close(fd)
