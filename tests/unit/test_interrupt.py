# SPDX-License-Identifier: Apache-2.0
"""SIGHUP, as an order and as a question."""

import os
import signal
import subprocess
import sys

RUN = """
import signal, sys
from qmpbackup import interrupt
from qmpbackup.errors import Interrupted
signal.signal(signal.SIGHUP, lambda *_: sys.exit("not held"))
with interrupt.held(), interrupt.hangups_survived(sys.argv[1]):
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            interrupt.check()
            print("goes on", flush=True)
        except Interrupted as error:
            print("ends with", error.exit_status, flush=True)
print("over")
"""


def start(program: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", RUN, program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def asked(run: "subprocess.Popen[str]") -> str:
    """What becomes of the run at its next checkpoint."""
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write("\n")
    run.stdin.flush()
    return run.stdout.readline().strip()


def test_an_order() -> None:
    with start("restic") as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        assert asked(run) == "goes on"
        os.kill(run.pid, signal.SIGHUP)
        answers = (asked(run) for _ in range(100_000))
        assert next(answer for answer in answers if answer != "goes on") == "ends with 129"
        out, _ = run.communicate(timeout=30)
    assert out == "over\n"


def test_a_question() -> None:
    with start("sh") as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        for _ in range(3):
            subprocess.run(["sh", "-c", 'kill -HUP "$1"', "sh", str(run.pid)], check=True)
        assert asked(run) == "goes on"
        out, _ = run.communicate(timeout=30)
    assert out == "over\n"


IN_A_THREAD = """
import signal, threading
from qmpbackup import interrupt
from qmpbackup.errors import Interrupted
with interrupt.held():
    signal.raise_signal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt.check)
    thread.start()
    thread.join()
    try:
        interrupt.check()
    except Interrupted as error:
        print("ends with", error.exit_status)
"""


def test_a_thread_takes_no_signal_from_the_run() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD], capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == ("ends with 143\n", "")
