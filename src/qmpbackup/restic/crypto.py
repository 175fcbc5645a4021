# SPDX-License-Identifier: Apache-2.0
"""Sealed objects: everything in a repository is encrypted and authenticated in one way.

    IV (16) ‖ AES-256-CTR ciphertext ‖ Poly1305-AES over the ciphertext (16)

The one-time key of Poly1305 is r ‖ AES-128(k, IV), r clamped ("The Poly1305-AES message-authentication
code", Bernstein 2005; restic, doc/design.rst, "Keys, Encryption and MAC"). A key never encrypts two
objects under one IV: IVs are 16 random bytes each.
"""

import hmac
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from cryptography.hazmat.primitives.poly1305 import Poly1305

from qmpbackup.errors import DamagedError

IV = 16
MAC = 16
OVERHEAD = IV + MAC
"""Bytes by which a sealed object is longer than what is in it."""

_CLAMP = int.from_bytes(bytes.fromhex("ffffff0ffcffff0ffcffff0ffcffff0f"), "little")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Key:
    """The three parts of a key: 32 bytes to encrypt, and 16 each for Poly1305-AES's k and r."""

    encrypt: bytes = field(repr=False)
    mac_k: bytes = field(repr=False)
    mac_r: bytes = field(repr=False)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Key":
        """Cut 64 bytes, such as scrypt's output, into encrypt ‖ k ‖ r.

        Raises:
            ValueError: there are not 64 of them.
        """
        if len(data) != 64:
            raise ValueError("a key has 64 bytes")
        return cls(data[:32], data[32:48], clamp(data[48:]))

    @classmethod
    def random(cls) -> "Key":
        """A new key."""
        return cls.from_bytes(os.urandom(64))


def clamp(r: bytes) -> bytes:
    """Clear the bits of r that Poly1305 wants clear."""
    return (int.from_bytes(r, "little") & _CLAMP).to_bytes(16, "little")


def seal(key: Key, plain: Buffer) -> bytes:
    """Encrypt and authenticate."""
    return seal_blocks(key, [plain])


def seal_blocks(key: Key, blocks: Iterable[Buffer]) -> bytes:
    """Encrypt and authenticate what comes in blocks, as one object."""
    iv = os.urandom(IV)
    encryptor = Cipher(AES(key.encrypt), CTR(iv)).encryptor()
    mac = _mac(key, iv)
    sealed = [iv]
    for block in blocks:
        ciphertext = encryptor.update(block)
        mac.update(ciphertext)
        sealed.append(ciphertext)
    return b"".join([*sealed, mac.finalize()])


def unseal(key: Key, sealed: Buffer, what: str) -> bytes:
    """Check and decrypt; `what` names the object in messages.

    Raises:
        DamagedError: it is not what was sealed with this key.
    """
    iv, ciphertext = _checked(key, sealed, what)
    return Cipher(AES(key.encrypt), CTR(iv)).decryptor().update(ciphertext)


def unseal_blocks(key: Key, sealed: Buffer, what: str, size: int) -> Iterator[bytes]:
    """Check all of an object, and decrypt it in blocks of `size` bytes.

    Raises:
        DamagedError: it is not what was sealed with this key; before there is any block.
    """
    iv, ciphertext = _checked(key, sealed, what)
    decryptor = Cipher(AES(key.encrypt), CTR(iv)).decryptor()
    for start in range(0, len(ciphertext), size):
        yield decryptor.update(ciphertext[start : start + size])


def _checked(key: Key, sealed: Buffer, what: str) -> tuple[bytes, memoryview]:
    """IV and ciphertext of what was sealed with this key."""
    view = memoryview(sealed)
    if len(view) < OVERHEAD:
        raise DamagedError(f"{what} is damaged: it is too short.")
    iv, ciphertext, tag = bytes(view[:IV]), view[IV:-MAC], bytes(view[-MAC:])
    mac = _mac(key, iv)
    mac.update(ciphertext)
    if not hmac.compare_digest(tag, mac.finalize()):
        raise DamagedError(f"{what} is damaged: its authentication code does not fit.")
    return iv, ciphertext


def _mac(key: Key, iv: bytes) -> Poly1305:
    # One block of AES, as Poly1305-AES defines its one-time key; no mode of operation is meant.
    nonce = Cipher(AES(key.mac_k), ECB()).encryptor().update(iv)  # noqa: S305
    try:
        return Poly1305(key.mac_r + nonce)
    except ValueError as error:  # said of the length, which is right, whatever OpenSSL has refused
        raise MemoryError from error
