# SPDX-License-Identifier: Apache-2.0
"""Whether there is a repository, and which of its keys a password opens."""

import hashlib
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import DamagedError, UsageError, WrongPassword
from qmpbackup.restic import keyfile
from qmpbackup.restic.crypto import Key
from qmpbackup.restic.storage.interface import CONFIG, File, Kind, Missing, Storage
from qmpbackup.restic.unpacked import bounded, listed

_MOST_KEYS: Final = 20
"""Key files that are tried; as many as restic tries."""


def refuse_existing(storage: Storage) -> None:
    """See that there is nothing of a repository yet.

    Raises:
        UsageError: there is.
    """
    try:
        storage.size(CONFIG)
        found = "a repository"
    except Missing:
        kinds = (Kind.KEY, Kind.SNAPSHOT, Kind.INDEX)
        left = [kind for kind in kinds if listed(storage, kind)]
        found = f"something of a repository ({', '.join(left)})" if left else ""
    if found:
        raise UsageError(
            f"There is {found} at {storage.name} already.", "Choose another place, or use it."
        )


def unlock(storage: Storage, password: str, hint: str) -> Key:
    """The master key, by the first key file that the password opens; `hint` is how its name begins.

    Raises:
        WrongPassword: no key is for this password.
        DamagedError: there is none, or what would be for it is damaged.
    """
    keys = listed(storage, Kind.KEY)
    if hint:
        keys.sort(key=lambda each: not each[0].startswith(hint))
    damaged: DamagedError | None = None
    for name, size in keys[:_MOST_KEYS]:
        interrupt.check()
        try:
            data = bounded(storage, File(Kind.KEY, name), size)
            if hashlib.sha256(data).hexdigest() != name:
                raise DamagedError(f"The key {name} is damaged: its hash is not its name.")
            key = keyfile.unlock(keyfile.parse(data, name), password, name)
        except Missing:
            continue
        except DamagedError as error:
            damaged = error
            continue
        if key is not None:
            return key
    if damaged is not None:
        raise damaged
    if not keys:
        raise DamagedError(f"The repository at {storage.name} has no key.")
    raise WrongPassword(
        f"No key of the repository at {storage.name} is for this password.",
        f"Only {_MOST_KEYS} of its keys were tried; RESTIC_KEY_HINT names the one to try first."
        if len(keys) > _MOST_KEYS
        else "Look at RESTIC_PASSWORD, RESTIC_PASSWORD_FILE and RESTIC_PASSWORD_COMMAND.",
    )
