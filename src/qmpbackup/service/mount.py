# SPDX-License-Identifier: Apache-2.0
"""Show the disks of a point as files in a folder, until told to end: `serve`, and nbdfuse on its socket.

    see that the folder takes them ─ serve ─ an nbdfuse a disk, mounted over an empty file ─ … ─ unmount

nbdfuse is libnbd's program. It dies with us, and unmounts as it does.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from qmpbackup.durable import make_folders, storage_errors
from qmpbackup.errors import QmpBackupError, StorageError, UsageError
from qmpbackup.model import StoredDisk
from qmpbackup.process import Child, run
from qmpbackup.service.serve import Request as Serve
from qmpbackup.service.serve import Served, serve
from qmpbackup.targets.interface import Address
from qmpbackup.targets.names import folder_name

_POLL_SECONDS = 0.1
_END_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """Which disks of which point, and the folder for their files."""

    target: Address
    point: str
    folder: Path
    vm: str = ""
    disks: tuple[str, ...] = ()
    lock_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A disk and its file."""

    disk: StoredDisk
    file: Path


def mount(request: Request, announce: Callable[[Sequence[Shown]], None]) -> None:
    """Show the disks until a signal comes, or all are unmounted; `announce` is told when all are there.

    Raises:
        DamagedError: a disk was withdrawn, as a file of it is damaged.
        QmpBackupError: nothing could be shown, and nothing is left mounted.
    """
    with ExitStack() as stack:
        mounts = _Mounts(request.folder, announce)
        stack.callback(mounts.end)
        serve(
            Serve(
                target=request.target,
                point=request.point,
                vm=request.vm,
                disks=request.disks,
                lock_wait=request.lock_wait,
            ),
            mounts.begin,
        )
    if mounts.failure is not None:
        raise mounts.failure


class _Mounts:
    """The nbdfuse processes, and a thread that waits for them to show something or to end."""

    def __init__(self, folder: Path, announce: Callable[[Sequence[Shown]], None]) -> None:
        self.failure: QmpBackupError | None = None
        self._folder = folder
        self._announce = announce
        self._stack = ExitStack()
        self._children: list[Child] = []
        self._shown: list[Shown] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mounts", daemon=True)

    def begin(self, served: Served) -> None:
        """Start an nbdfuse for each disk; they connect once we serve."""
        for disk in served.disks:
            file = self._folder / f"{folder_name(disk.id)}.raw"
            self._stack.enter_context(_place(self._folder, file))
            uri = f"nbd+unix:///{quote(disk.id, safe='')}?socket={quote(str(served.socket))}"
            words = ["nbdfuse", "--readonly", str(file), uri]
            child = Child(words, at_our_death=signal.SIGTERM)
            self._stack.enter_context(child)
            self._children.append(child)
            self._shown.append(Shown(disk, file))
        self._thread.start()

    def _watch(self) -> None:
        announced = ready = False
        while not self._over.wait(_POLL_SECONDS):
            if any(child.failed for child in self._children):
                self._give_up()
                return
            if announced:
                if all(child.ended for child in self._children):  # somebody has unmounted them
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            elif ready:
                announced = True
                self._announce(self._shown)
            else:
                ready = self._are_ready()

    def _are_ready(self) -> bool:
        """Whether all is shown, by programs that unmount it when we are killed: a mount is there before
        its program can be told to end in order."""
        return all(map(_is_there, self._shown)) and all(
            child.catches(signal.SIGTERM) for child in self._children
        )

    def _give_up(self) -> None:
        failed = next(child for child in self._children if child.failed)
        self.failure = StorageError(
            f"The disks cannot be shown: {failed.end(_END_SECONDS).reason}.",
            "See that /dev/fuse is there and may be used, and that fusermount3 is installed.",
        )
        os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """Unmount all, and take the files away."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        for child in self._children:
            child.end(_END_SECONDS)
        self._stack.close()


def _is_there(shown: Shown) -> bool:
    """Whether the file is the disk already."""
    with suppress(OSError):
        return os.path.ismount(shown.file) or shown.file.stat().st_size >= shown.disk.size
    return False


@contextmanager
def _place(folder: Path, file: Path) -> Iterator[None]:
    """An empty file to mount over, which is gone after the block; so is the folder if we made it.

    Raises:
        UsageError: something is there.
    """
    with storage_errors(f"make {file}"):
        made = not folder.exists()
        make_folders(folder)
        _unmount_dead(file)
        try:
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            if file.stat().st_size:
                raise UsageError(f"{file} is there.", "Choose another folder.") from None
    try:
        yield
    finally:
        _unmount(file)
        with suppress(OSError):
            file.unlink()
        if made:
            with suppress(OSError):
                folder.rmdir()


def _unmount_dead(file: Path) -> None:
    """Unmount what a killed nbdfuse has left."""
    try:
        file.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        _unmount(file)


def _unmount(file: Path) -> None:
    """Unmount a file, also while somebody still reads it; most often that has been done."""
    deadline = time.monotonic() + _END_SECONDS
    while _is_mounted(file) and time.monotonic() < deadline:
        run(["fusermount3", "-u", "-z", str(file)])
        time.sleep(_POLL_SECONDS)


def _is_mounted(file: Path) -> bool:
    mounted = Path("/proc/self/mounts").read_bytes().splitlines()
    # The file itself cannot be resolved while what served it is gone.
    name = os.fsencode(file.parent.resolve() / file.name)
    for byte in b"\\ \t\n#":  # fs/seq_file.c, mangle; the backslash first
        name = name.replace(bytes([byte]), b"\\%03o" % byte)
    return any(line.split(b" ")[1] == name for line in mounted)
