# SPDX-License-Identifier: Apache-2.0
"""Whether somebody has written to an open file, as its times tell it.

Times are the kernel's own on local file systems only. Servers and FUSE programs give what they like:
rclone shows two times by turns for a file that nobody touches. There only the length is looked at.
Knows descriptors; must not know what is in the files.
"""

import os
import re
from pathlib import Path
from typing import Final

Stamp = tuple[int, ...]

_REMOTE: Final = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "pvfs2",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
        "vmhgfs",
    ]
)
_MOUNT: Final = re.compile(r"^mnt_id:\s*(\d+)$", re.MULTILINE)


def stamp(fd: int) -> Stamp:
    """What changes with each write, as far as the file system tells.

    Raises:
        OSError: it cannot be looked at.
    """
    state = os.fstat(fd)
    if _is_local(fd):
        return state.st_size, state.st_mtime_ns, state.st_ctime_ns
    return (state.st_size,)


def _is_local(fd: int) -> bool:
    kind = _file_system(fd)
    return not kind.startswith("fuse") and kind not in _REMOTE


def _file_system(fd: int) -> str:
    """The kind of the file system of an open file (proc(5), mountinfo); empty where it has no mount."""
    match = _MOUNT.search(Path(f"/proc/self/fdinfo/{fd}").read_text())
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    for line in mounts:
        before, _, after = line.partition(" - ")
        if match is not None and before.split(maxsplit=1)[0] == match[1]:
            return after.split(maxsplit=1)[0]
    return ""
