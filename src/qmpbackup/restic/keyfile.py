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

from qmpbackup.errors import DamagedError
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

_MOST_MEMORY: Final = 132 << 20
"""Bytes that scrypt may take: four times restic's, and a little more than rustic's."""

_MOST_WORK: Final = 2 << 30
"""Bytes that scrypt may go through: some five seconds, as many rounds as twice our most."""


@dataclass(frozen=True, slots=True)
class Scrypt:
    """The cost of one password. Memory is 128·r·(N + p) bytes, work 128·N·r·p."""

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
            maxmem=self.memory + 256 * self.r + (1 << 20),  # OpenSSL counts some more
            dklen=_KEY,
        )
        return Key.from_bytes(made)

    @property
    def is_reasonable(self) -> bool:
        """Whether scrypt is defined for this, and it takes no more than we are willing to give."""
        defined = self.n > 1 and self.n & (self.n - 1) == 0 and self.r > 0 and self.p > 0
        return defined and self.memory <= _MOST_MEMORY and self.work <= _MOST_WORK

    @property
    def memory(self) -> int:
        """Bytes that scrypt takes (RFC 7914: its V and its B)."""
        return 128 * self.r * (self.n + self.p)

    @property
    def work(self) -> int:
        """Bytes that it goes through."""
        return 128 * self.n * self.r * self.p


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
        MemoryError: there is not enough.
    """
    what = f"The key {name}"
    try:
        user = file.scrypt.derive(password, file.salt)
    except ValueError as error:  # so it says that it got no memory; all else was checked
        raise MemoryError from error
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
