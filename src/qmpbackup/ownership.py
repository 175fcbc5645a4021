# SPDX-License-Identifier: Apache-2.0
"""Whether a folder, and the way to it, is ours alone, so that nobody else can exchange what we do there.

Knows descriptors, owners and modes; must not know what is kept in the folder.
"""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from qmpbackup.errors import StorageError, UsageError

_ACL = "system.posix_acl_access"  # acl(5); where there is one, the mode's group bits are its mask


def require_ours(fd: int, path: Path) -> None:
    """Refuse a folder that others could rearrange while we write into it.

    Accepted are folders of ours and of root's into which nobody else may write, or that have the
    sticky bit. The group may, where it is its owner's alone. Servers and file systems that give every
    file the same owner or mode (NFS with squashing, CIFS, FAT) are recognised by a file that we create.

    Args:
        fd: the open folder.
        path: what messages call it.

    Raises:
        StorageError: it is somebody else's, or others may write into it.
        OSError: it could not be looked at.
    """
    state = os.fstat(fd)
    foreign = state.st_uid not in {0, os.geteuid()}
    others = _open_to(fd, state)
    if not (foreign or others):
        return
    probe = _probe(fd)
    if foreign and probe.st_uid != state.st_uid:
        raise StorageError(
            f"{path} belongs to another user.",
            f"Give it to the user who makes backups: chown {os.geteuid()} FOLDER.",
        )
    others &= ~probe.st_mode
    if others & stat.S_IWOTH:
        raise StorageError(f"Everybody may write into {path}.", "Change that: chmod o-w FOLDER.")
    if others & stat.S_IWGRP:
        raise StorageError(
            f"A group of users may write into {path}.", "Change that: chmod g-w FOLDER."
        )


def is_private(state: os.stat_result) -> bool:
    """Whether this is a folder of ours, and no link to one, into which nobody else may write."""
    writable = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not writable


def make_private(path: Path) -> None:
    """Make a folder for us alone, and those above it that are missing.

    Raises:
        OSError: it cannot be made, or others might have put there what they like.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    if not is_private(path.lstat()):
        raise PermissionError("it is not for us alone")
    path.chmod(0o700)


def refuse_planted_links(path: Path) -> None:
    """Refuse what the kernel refuses where `fs.protected_symlinks` is set: a link on a path that somebody
    else has put into a folder that is open to all.

    Raises:
        UsageError: there is one.
        OSError: something cannot be looked at.
    """
    whole = Path(os.path.abspath(path))  # noqa: PTH100 - must not follow links
    for each in (*reversed(whole.parents), whole):
        with suppress(FileNotFoundError, NotADirectoryError):
            link, holder = each.lstat(), each.parent.stat()
            is_open = holder.st_mode & stat.S_ISVTX and holder.st_mode & stat.S_IWOTH
            theirs = link.st_uid not in {os.geteuid(), holder.st_uid}
            if stat.S_ISLNK(link.st_mode) and is_open and theirs:
                raise UsageError(
                    f"{each} is a link that another user has put there.",
                    "Name the place that it leads to, if that is what you mean.",
                )


def _open_to(fd: int, state: os.stat_result) -> int:
    """The bits of the mode by which others may exchange what is in a folder."""
    if state.st_mode & stat.S_ISVTX:
        return 0
    bits = state.st_mode & stat.S_IWOTH
    if state.st_mode & stat.S_IWGRP and (_has_acl(fd) or not _is_alone(state)):
        bits |= stat.S_IWGRP
    return bits


def _is_alone(state: os.stat_result) -> bool:
    """Whether the group is the private one of the owner (`umask 002` goes with those): it has the
    owner's name, and nobody else is in it."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(state.st_uid), grp.getgrgid(state.st_gid)
    except KeyError:
        return False
    mine = group.gr_name == owner.pw_name and owner.pw_gid == group.gr_gid
    return mine and set(group.gr_mem) <= {owner.pw_name}


def _has_acl(fd: int) -> bool:
    try:
        os.getxattr(fd, _ACL)
    except OSError:  # none, or a file system without
        return False
    return True


def _probe(fd: int) -> os.stat_result:
    name = f".probe-{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    probe = os.open(name, flags, 0o600, dir_fd=fd)
    try:
        return os.fstat(probe)
    finally:
        os.close(probe)
        os.unlink(name, dir_fd=fd)
