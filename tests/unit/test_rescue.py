# SPDX-License-Identifier: Apache-2.0
"""What the watchdog's process does for a run that is dead, at a monitor that is ours."""

import json
import socket
import threading

import pytest

from lab.patience import PATIENCE
from qmpbackup.machine import rescue
from qmpbackup.machine.rescue import RescueLoop

UNREAD = 65 * 1024 * 1024


def carry_out(monitor: socket.socket) -> list[str]:
    """Answer the commands of one attempt; what they were."""
    done = []
    with monitor.makefile("rb") as lines:
        for line in lines:
            if line.strip(b"\xff\n"):
                request = json.loads(line.lstrip(b"\xff"))
                done.append(request["execute"])
                answer = {"return": {}, "id": request["id"]}
                monitor.sendall(json.dumps(answer).encode() + b"\n")
            if len(done) == 2:
                break
    return done


def test_what_a_dead_run_had_not_read_costs_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the host is: a turn of the process takes as long as it gets no processor."""
    monkeypatch.setattr(rescue, "_TICK_SECONDS", 5.0)
    run, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monitor, connection = socket.socketpair()
    with run, control, monitor, connection:
        run.settimeout(PATIENCE)
        monitor.settimeout(PATIENCE)
        loop = threading.Thread(target=RescueLoop(control, connection, None).run)
        loop.start()
        run.send(b"arm stop 1000")
        assert run.recv(16) == rescue.FINE
        run.shutdown(socket.SHUT_RDWR)
        monitor.sendall(b"x" * UNREAD + b"\n")
        assert carry_out(monitor) == ["cont", "object-del"]
        loop.join(PATIENCE)
        assert not loop.is_alive()
