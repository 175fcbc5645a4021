# SPDX-License-Identifier: Apache-2.0
"""Images that qemu-nbd serves, and internal snapshots of them as something that qemu-img can read.

qemu-img compares images but no snapshots. Knows images and processes; must not know targets.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.images import qemu_img
from qmpbackup.images.layers import Layer, Openable, opened
from qmpbackup.process import Child

_START_SECONDS = 60.0
_POLL_SECONDS = 0.01


@contextmanager
def snapshot(layer: Layer, name: str) -> Iterator[Openable]:
    """Serve a snapshot of one image for the block; gives what QEMU opens.

    Raises:
        QmpBackupError: the image has no such snapshot, or qemu-nbd cannot be run.
    """
    with serving([layer], of_snapshot(name), f"open snapshot {name} of {layer.name}") as socket:
        yield Openable({"driver": "nbd", "server": {"type": "unix", "path": socket}}, ())


def of_snapshot(name: str) -> list[str]:
    """The options by which qemu-nbd shows an internal snapshot."""
    return ["--load-snapshot", f"snapshot.name={name.replace(',', ',,')}"]


@contextmanager
def serving(layers: Sequence[Layer], options: Sequence[str], action: str) -> Iterator[str]:
    """Serve the last of a chain for the block, read-only, to as many as want; gives the socket.

    Raises:
        QmpBackupError: qemu-nbd cannot be run; `action` says what it was to do.
        Interrupted: a signal is waiting.
    """
    import tempfile

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qmpbackup-"))
        place = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, place)
        image = stack.enter_context(opened(layers))
        socket, started = f"{folder}/nbd", Path(folder) / "pid"
        command = ["qemu-nbd", "--read-only", "--persistent", "--shared=0", *options]
        command += [f"--socket={socket}", f"--pid-file={started}", image.name]
        with Child(command, pass_fds=image.fds, writable=[place]) as child:
            _await_start(child, started, action)
            yield socket


def _await_start(child: Child, started: Path, action: str) -> None:
    """Wait until qemu-nbd listens: then it writes its process id to the file `started`."""
    deadline = time.monotonic() + _START_SECONDS
    while not (started.exists() and started.stat().st_size):
        interrupt.check()
        if child.failed or time.monotonic() > deadline:
            child.kill()
            raise qemu_img.failure(child.wait(), action)
        time.sleep(_POLL_SECONDS)
