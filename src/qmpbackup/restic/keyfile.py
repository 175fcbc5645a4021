# SPDX-License-Identifier: Apache-2.0
"""Key files: the repository's master key, sealed with what scrypt makes of a password.

A repository has one master key and a key file for each password (doc/design.rst, "Keys, Encryption
and MAC"). A key file can be read by anybody, and says itself how much memory and time scrypt takes:
what it asks for is limited before scrypt runs. Knows nothing of where key files lie.
"""

import base64
import os
import socket
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from qmpbackup.errors import DamagedError, StorageError
from qmpbackup.restic import gojson
from qmpbackup.restic.crypto import OVERHEAD, Key, seal, unseal

LARGEST: Final = 1 << 20
"""Bytes of a key file that are believed; restic's have half a kilobyte."""

_SALT: Final = 64
_KEY: Final = 64

# What restic makes: memory of 32 MiB (the power of two below its limit of 60), and as many rounds
# as fit into half a second (internal/repository/key.go, KDFTimeout and KDFMemory).
_N: Final = 1 << 15
_R: Final = 8
_SECONDS: Final = 0.5
_MOST_ROUNDS: Final = 32

_MOST_MEMORY: Final = 256 << 20
"""Bytes that scrypt may take: eight times restic's, twice rustic's."""

_MOST_WORK: Final = 16 << 30
"""Bytes that scrypt may go through: about a minute."""


@dataclass(frozen=True, slots=True)
class Scrypt:
    """The cost of one password. Memory is 128·N·r bytes, work that times p."""

    n: int
    r: int
    p: int

    def derive(self, password: str, salt: bytes) -> Key:
        """The key that a password and a salt make."""
        import hashlib

        made = hashlib.scrypt(
            password.encode(errors="surrogateescape"),
            salt=salt,
            n=self.n,
            r=self.r,
            p=self.p,
            # OpenSSL counts some more than 128·N·r; what is too much was refused before.
            maxmem=_MOST_MEMORY + 128 * self.r * self.p + (1 << 20),
            dklen=_KEY,
        )
        return Key.from_bytes(made)

    @property
    def is_reasonable(self) -> bool:
        """Whether scrypt is defined for this, and it takes no more than we are willing to give."""
        defined = self.n > 1 and self.n & (self.n - 1) == 0 and self.r > 0 and self.p > 0
        memory = 128 * self.n * self.r
        return defined and memory <= _MOST_MEMORY and memory * self.p <= _MOST_WORK


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What a key file says in the clear, and the sealed master key."""

    created: datetime
    username: str
    hostname: str
    scrypt: Scrypt
    salt: bytes
    data: bytes


def calibrate() -> Scrypt:
    """The cost that this machine bears in the time restic gives it, never below N = 2^15, p = 1."""
    one = Scrypt(_N, _R, 1)
    start = time.perf_counter()
    one.derive("", bytes(_SALT))
    taken = max(time.perf_counter() - start, 1e-3)
    return Scrypt(_N, _R, max(1, min(_MOST_ROUNDS, int(_SECONDS / taken))))


def create(master: Key, password: str, cost: Scrypt | None = None) -> bytes:
    """A key file for a password; its name is the SHA-256 of these bytes.

    `cost` is this machine's calibrated one unless given.
    """
    cost = cost or calibrate()
    salt = os.urandom(_SALT)
    clear = {
        "created": datetime.now().astimezone(),
        "username": username(),
        "hostname": socket.gethostname(),
        "kdf": "scrypt",
        "N": cost.n,
        "r": cost.r,
        "p": cost.p,
        "salt": _base64(salt),
        "data": _base64(seal(cost.derive(password, salt), _encode_master(master))),
    }
    return gojson.dump(clear).encode()


def parse(data: bytes, name: str) -> KeyFile:
    """The key file of this name.

    Raises:
        DamagedError: this is none, or it asks for more than it may.
    """
    what = f"The key {name}"
    members = gojson.Members(gojson.load(data, what), what)
    cost = Scrypt(members.number("N"), members.number("r"), members.number("p"))
    if members.string("kdf") != "scrypt":
        raise gojson.damaged(what, "its function to derive keys is not scrypt")
    if not cost.is_reasonable:
        raise gojson.damaged(what, "what it asks of scrypt is beyond all measure")
    found = KeyFile(
        created=members.time("created"),
        username=members.string("username"),
        hostname=members.string("hostname"),
        scrypt=cost,
        salt=members.base64("salt"),
        data=members.base64("data"),
    )
    if len(found.salt) != _SALT or len(found.data) < OVERHEAD:
        raise gojson.damaged(what, "its salt or its data is too short")
    return found


def unlock(file: KeyFile, password: str, name: str) -> Key | None:
    """The master key, or None where the password is another.

    Raises:
        DamagedError: it opens, and there is no key in it.
        StorageError: there is not enough memory.
    """
    what = f"The key {name}"
    try:
        user = file.scrypt.derive(password, file.salt)
    except (MemoryError, ValueError) as error:
        raise StorageError(f"There is not enough memory to open the key {name}.") from error
    try:
        opened = unseal(user, file.data, what)
    except DamagedError:
        return None
    members = gojson.Members(gojson.load(opened, what), what)
    mac = gojson.Members(members.object("mac") or {}, what)
    parts = members.base64("encrypt"), mac.base64("k"), mac.base64("r")
    if [len(part) for part in parts] != [32, 16, 16] or not any(parts[1]) or not any(parts[2]):
        raise gojson.damaged(what, "there is no master key in it")
    return Key.from_bytes(b"".join(parts))


def username() -> str:
    """The name of the user we are, as far as the system knows one."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return ""


def _encode_master(key: Key) -> bytes:
    mac = {"k": _base64(key.mac_k), "r": _base64(key.mac_r)}
    return gojson.dump({"mac": mac, "encrypt": _base64(key.encrypt)}).encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
