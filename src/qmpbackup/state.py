# SPDX-License-Identifier: Apache-2.0
"""Where what must outlive a restart of the host is kept."""

import os
from pathlib import Path

_NAME = "qmpbackup"


def state_folder() -> Path:
    """The folder for it: root's in /var/lib. A unit's own is believed only if it is named for us, as a
    command of ours may be started by somebody else's unit."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if base:
        return Path(base) / _NAME
    for folder in map(Path, filter(None, os.environ.get("STATE_DIRECTORY", "").split(":"))):
        if folder.name == _NAME and folder.is_absolute():
            return folder
    if os.geteuid() == 0:
        return Path("/var/lib") / _NAME
    return Path.home() / ".local" / "state" / _NAME
