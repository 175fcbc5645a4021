# SPDX-License-Identifier: Apache-2.0
"""What doctor finds, as values."""

from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    """How much a finding matters."""

    FINE = "fine"
    ADVICE = "advice"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what it is about, what was found, and what to do (or nothing)."""

    about: str
    health: Health
    text: str
    todo: str = ""
