# SPDX-License-Identifier: Apache-2.0
"""Whether there is a repository, which of its keys a password opens, and how one begins."""

import hashlib
from contextlib import suppress
from typing import Final

from qmpbackup import interrupt
from qmpbackup.errors import (
    DamagedError,
    NoSuchTarget,
    QmpBackupError,
    UsageError,
    WrongPassword,
)
from qmpbackup.restic import config as configs
from qmpbackup.restic import keyfile
from qmpbackup.restic.ahead import Ahead
from qmpbackup.restic.config import Config
from qmpbackup.restic.crypto import Key, seal, unseal
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


def make(storage: Storage, password: str, cost: keyfile.Scrypt | None) -> tuple[Key, Config]:
    """A new repository's key and configuration; see `Repository.create`.

    Raises:
        UsageError: there is a repository, or what is left of one.
        StorageError: it could not be written.
    """
    refuse_existing(storage)
    storage.create()
    key, config = Key.random(), configs.create()
    data = keyfile.create(key, password, cost)
    file = File(Kind.KEY, hashlib.sha256(data).hexdigest())
    sealed = seal(key, configs.encode(config))
    storage.save(file, [data])
    try:
        storage.save(CONFIG, [sealed])
        # Saving changes nothing where somebody else was quicker.
        if bounded(storage, CONFIG) != sealed:
            refuse_existing(storage)
    except BaseException:
        with suppress(QmpBackupError):
            storage.remove(file)
        raise
    return key, config


def enter(
    storage: Storage, ahead: Ahead, password: str, hint: str, *, to_read: bool
) -> tuple[Key, Config]:
    """A repository's key and configuration; see `Repository.open`. All is asked at once that is needed
    for them and next.

    Raises:
        NoSuchTarget: there is none.
        WrongPassword: no key is for this password.
        DamagedError: its configuration or its keys are damaged.
        UsageError: its version is not known here.
    """
    config = ahead.begin(lambda there: bounded(there, CONFIG))
    key = ahead.begin(lambda there: unlock(there, password, hint))
    ahead.ask(Kind.LOCK)
    if to_read:
        ahead.look()
    try:
        sealed = config()
    except Missing as error:
        raise NoSuchTarget(
            f"There is no repository at {storage.name}.",
            "If there should be one, see that it is mounted, and check the location. To make one: "
            "qmpbackup init.",
        ) from error
    opened = key()
    return opened, configs.parse(unseal(opened, sealed, "The repository's config"))


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
