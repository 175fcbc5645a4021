# SPDX-License-Identifier: Apache-2.0
"""Looking at the room on file systems: before something is begun, and while it goes on.

A thread looks, because storage that hangs would hold up whoever asks it; what it finds is told to
whoever looks at signals (`interrupt.check`), once, like a signal.
"""

import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qmpbackup import interrupt
from qmpbackup.errors import StorageError
from qmpbackup.machine.host_files import HostFile
from qmpbackup.plan import room
from qmpbackup.plan.room import Need, Space

LOOK_SECONDS = 0.05
"""Between two looks of the thread. With the tenth of a second in which a run is told, and what it takes
to let go of everything, this is how long a guest may write past the reserve."""

_LOOK_AGAIN_SECONDS = 1.0
_MOST_EXTENTS = 20_000


def space(folder: Path) -> Space | None:
    """The file system of a folder, or of the first one above it that is there; `None` where it does
    not say how large it is.

    Raises:
        OSError: it cannot be looked at.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - must not follow links
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    state = os.statvfs(folder)
    if not state.f_blocks:
        return None
    return Space(
        device=folder.stat().st_dev,
        folder=str(folder),
        total=state.f_blocks * state.f_frsize,
        free=state.f_bavail * state.f_frsize,
    )


def by_space(needs: Iterable[tuple[Path, Need]]) -> list[tuple[Space, list[Need]]]:
    """What is needed on each file system."""
    found: dict[int, tuple[Space, list[Need]]] = {}
    for folder, need in needs:
        with suppress(OSError):
            place = space(folder)
            if place is not None:
                found.setdefault(place.device, (place, []))[1].append(need)
    return list(found.values())


def require(needs: Iterable[tuple[Path, Need]], wanted: int | None, hint: str) -> None:
    """Refuse what would take of a reserve for certain; `hint` says what to do, without a full stop.

    Raises:
        StorageError: it would.
    """
    for place, here in by_space(needs):
        missing = room.shortage(place, here, wanted)
        if missing:
            raise StorageError(missing, f"{hint}; nothing was changed.")


def held_bytes(files: Sequence[HostFile]) -> int | None:
    """How many bytes of data the files below a disk hold, as far as can be told from outside."""
    held = 0
    for file in files:
        if file.holds_snapshots or not file.is_plain:
            return None
        data = _data_bytes(file.path)
        held += file.allocated if data is None else data
    return held


def _data_bytes(path: Path) -> int | None:
    """Bytes of a file without its holes, and without what is only reserved for it (lseek(2))."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            return None
        with ExitStack() as stack:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return min(state.st_blocks * 512, _without_holes(fd, state.st_size))
    except OSError:
        return None


def _without_holes(fd: int, size: int) -> int:
    found, at = 0, 0
    for _ in range(_MOST_EXTENTS):
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no more data
            return found
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found += at - start
    return found + size - at


class Lookout:
    """A thread that looks at file systems until the room on one of them is below its reserve."""

    def __init__(self, spaces: Sequence[Space], wanted: int | None, hint: str) -> None:
        self._hint = hint
        self.finding = ""
        """What was found, as a sentence; empty as long as all is well."""
        self._places = [(each, each.reserve(wanted)) for each in spaces if wanted != 0]
        self._told = False
        self._rounds = 0
        self._wake = threading.Event()
        self._looked = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, name="room", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        if self._places:
            self._thread.start()

    def end(self) -> None:
        """Look no more."""
        self._ended = True
        self._wake.set()

    def ask(self) -> None:
        """Tell what was found, once.

        Raises:
            StorageError: a reserve would be touched.
        """
        if self.finding and not self._told:
            self._told = True
            raise self.error()

    def error(self) -> StorageError:
        """The error for what was found."""
        return StorageError(self.finding, f"{self._hint}, then run again; nothing was lost.")

    def look_now(self) -> str:
        """What there is to be found at this moment; what storage that hangs hides is not waited for."""
        if self._places and not self.finding:
            with self._looked:
                before = self._rounds
                self._wake.set()
                self._looked.wait_for(
                    lambda: self.finding or self._rounds > before + 1, _LOOK_AGAIN_SECONDS
                )
        return self.finding

    def _watch(self) -> None:
        while not self._ended and not self.finding:
            for place, reserve in self._places:
                self._look(place, reserve)
            with self._looked:
                self._rounds += 1
                self._looked.notify_all()
            if self._wake.wait(LOOK_SECONDS):
                self._wake.clear()

    def _look(self, place: Space, reserve: int) -> None:
        with suppress(OSError):
            state = os.statvfs(place.folder)
            free = state.f_bavail * state.f_frsize
            if free < reserve:
                self.finding = self.finding or room.given_up(place, reserve, free)


@contextmanager
def required(
    needs: Iterable[tuple[Path, Need]], wanted: int | None, hint: str
) -> Iterator[Lookout]:
    """Refuse what does not fit (`require`), and give it up in the block where it does no more (`kept`).

    Raises:
        StorageError: now, or out of the block.
    """
    needed = list(needs)
    require(needed, wanted, hint)
    with kept([place for place, _ in by_space(needed)], wanted, hint) as lookout:
        yield lookout


@contextmanager
def kept(spaces: Sequence[Space], wanted: int | None, hint: str) -> Iterator[Lookout]:
    """Give up what goes on in the block, wherever it looks at signals, before a reserve is touched.

    Raises:
        StorageError: out of the block.
    """
    lookout = Lookout(spaces, wanted, hint)
    lookout.start()
    try:
        with interrupt.asking(lookout.ask):
            yield lookout
    finally:
        lookout.end()
