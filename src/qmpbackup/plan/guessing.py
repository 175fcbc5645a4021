# SPDX-License-Identifier: Apache-2.0
"""What somebody may have meant who wrote a word that is none."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

_LONGEST: Final = 64
"""Characters of a word that is compared with others."""


def close_to(word: str, known: Iterable[str]) -> str:
    """The known word that a wrong one is closest to; empty: it is close to none."""
    if len(word) > _LONGEST:
        return ""
    by_letters = {each.lower().replace("-", "_"): each for each in known}
    found = get_close_matches(word.lower().replace("-", "_"), by_letters, 1, 0.65)
    return by_letters[found[0]] if found else ""


def or_did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a wrong word, with the known one that it is close to."""
    found = close_to(word, known)
    return f'; did you mean "{found}"?' if found else "."
