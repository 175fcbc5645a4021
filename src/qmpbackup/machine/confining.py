# SPDX-License-Identifier: Apache-2.0
"""What a QEMU is started by that runs what nobody trusts.

It knows none of our secrets, and as root it is run as the user `nobody`, without any right of root's and
in a network namespace of its own. QEMU confines itself besides (seccomp).
"""

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from qmpbackup.durable import storage_errors
from qmpbackup.machine.booting import guest_environment

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def confined(bounds: Sequence[str]) -> Sequence[str]:
    """What stands before the command; `bounds` are the words that bound what it takes."""
    told = (
        *("env", "-i", *(f"{name}={said}" for name, said in guest_environment().items())),
        *bounds,
    )
    if os.geteuid() != 0:
        return told
    account = pwd.getpwnam("nobody")
    return (
        *told,
        *("unshare", "--net", "--"),
        *("setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"),
        *("--no-new-privs", "--bounding-set=-all", "--pdeathsig=KILL", "--"),
    )


def hand_over(folder: Path) -> None:
    """Give a folder and what is in it to the user whom QEMU is run as."""
    if os.geteuid() == 0:
        account = pwd.getpwnam("nobody")
        with storage_errors(f"hand {folder} over"):
            for each in (folder, *folder.iterdir()):
                os.chown(each, account.pw_uid, account.pw_gid, follow_symlinks=False)
