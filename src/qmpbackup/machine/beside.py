# SPDX-License-Identifier: Apache-2.0
"""Whether room may be taken in the folder of an image: only QEMU says that its disk lies there.

Root can make files anywhere, and QEMU fills those that it is given. So a QEMU that a guest has taken over
must not gain room by a name: it gets some only where it can write anyhow. Knows processes and files;
must not know what the room is for.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmpbackup.images import qemu_img

_NO_PLACES: Final = tuple(
    map(Path, ("/boot", "/dev", "/efi", "/etc", "/proc", "/run", "/sys", "/usr"))
)
"""Where no images belong (FHS), but much that every program may read, and so lock."""

_FLAGS: Final = re.compile(r"^flags:\s*([0-7]+)$", re.MULTILINE)


def is_image_folder(image: Path, pid: int | None) -> bool:
    """Whether the folder of a file is one where an image of this QEMU lies: it has the file open for
    writing.

    `pid` is the process at the other end of the monitor, if it is known. Where that is not QEMU itself,
    but what stands between, or what has made the socket, the locks of QEMU's programs on the file must
    do, in a folder where images can lie.

    Raises:
        OSError: it cannot be looked at.
    """
    if not image.is_absolute():
        return False
    state = image.stat()
    if not stat.S_ISREG(state.st_mode) or state.st_dev != image.parent.stat().st_dev:
        return False
    if pid is not None and _writes(pid, state):
        return True
    folder = image.parent.resolve()
    system = any(place in (folder, *folder.parents) for place in _NO_PLACES)
    return not system and qemu_img.in_use(image)


def _writes(pid: int, wanted: os.stat_result) -> bool:
    """Whether a process has a file open for writing, as far as we may know (proc(5))."""
    process = Path(f"/proc/{pid}")
    with suppress(OSError):
        for name in os.listdir(process / "fd"):  # noqa: PTH208 - names are all that is needed
            with suppress(OSError):
                found = (process / "fd" / name).stat()
                if os.path.samestat(found, wanted) and _is_writable(process / "fdinfo" / name):
                    return True
    return False


def _is_writable(info: Path) -> bool:
    match = _FLAGS.search(info.read_text())
    return match is not None and int(match[1], 8) & os.O_ACCMODE != os.O_RDONLY
