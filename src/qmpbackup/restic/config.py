# SPDX-License-Identifier: Apache-2.0
"""The configuration of a repository: its version, its id, and the polynomial of restic's chunker.

We cut chunks of fixed size and have no use for the polynomial, but restic wants one that is
irreducible, of degree 53 (doc/design.rst, "Configuration"). Polynomials over F2 are whole numbers
here: bit n is the coefficient of x^n.
"""

import secrets
from dataclasses import dataclass
from typing import Final

from qmpbackup.errors import UsageError
from qmpbackup.restic import gojson

LARGEST: Final = 1 << 20
"""Bytes of a configuration that are believed."""

VERSION: Final = 2
"""The version of the repositories that are made here."""

_DEGREE: Final = 53
_KNOWN: Final = frozenset({1, 2})


@dataclass(frozen=True, slots=True)
class Config:
    """A repository's configuration. `id` is 64 hexadecimal digits."""

    version: int
    id: str
    polynomial: int


def create() -> Config:
    """The configuration of a new repository."""
    return Config(VERSION, secrets.token_hex(32), random_polynomial())


def encode(config: Config) -> bytes:
    """A configuration as JSON."""
    members = {
        "version": config.version,
        "id": config.id,
        "chunker_polynomial": f"{config.polynomial:x}",
    }
    return gojson.dump(members).encode()


def parse(data: bytes) -> Config:
    """A configuration from JSON.

    Raises:
        DamagedError: this is none.
        UsageError: the repository is of a version that is not known here.
    """
    what = "The repository's config"
    members = gojson.Members(gojson.load(data, what), what)
    version, repository = members.number("version"), members.id("id")
    if repository is None:
        raise gojson.damaged(what, "it has no id")
    if version not in _KNOWN:
        raise UsageError(
            f"The repository has version {version} of the format; 1 and 2 are known here.",
            "Use a newer qmpbackup.",
        )
    try:
        polynomial = int(members.string("chunker_polynomial")[:17], 16)
    except ValueError as error:
        raise gojson.damaged(what, "its polynomial is none") from error
    return Config(version, repository.hex(), polynomial)


def random_polynomial() -> int:
    """An irreducible polynomial of degree 53; about one in 27 of those tried is."""
    while True:
        candidate = secrets.randbits(_DEGREE) | 1 << _DEGREE | 1
        if is_irreducible(candidate):
            return candidate


def is_irreducible(polynomial: int) -> bool:
    """Ben-Or's test: no factor of degree i divides x^(2^i) - x, for all i up to half the degree."""
    power = x = 2
    for _ in range((polynomial.bit_length() - 1) // 2):
        power = _remainder(_square(power), polynomial)
        if _common_divisor(polynomial, power ^ x) != 1:
            return False
    return True


def _square(polynomial: int) -> int:
    """Over F2, squaring puts a zero between all coefficients."""
    return int("0".join(f"{polynomial:b}"), 2)


def _remainder(dividend: int, divisor: int) -> int:
    while (shift := dividend.bit_length() - divisor.bit_length()) >= 0:
        dividend ^= divisor << shift
    return dividend


def _common_divisor(one: int, other: int) -> int:
    while other:
        one, other = other, _remainder(one, other)
    return one
