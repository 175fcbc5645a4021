# SPDX-License-Identifier: Apache-2.0
"""What a message is about, as fields beside its sentence, for the journal and for JSON. Must not know
either of them."""

from collections.abc import Mapping
from enum import StrEnum
from logging import LogRecord
from typing import Any


class Happening(StrEnum):
    """What programs may wait for in a log."""

    BEGIN = "begin"
    END = "end"
    FAILURE = "failure"


def about(
    event: Happening, *, for_programs: bool = False, **fields: str | int | None
) -> Mapping[str, Any]:
    """The `extra` of a message about a piece of work; what is empty is left out. One that is
    `for_programs` says what people are shown otherwise."""
    said = {name: value for name, value in fields.items() if value not in {"", None}}
    return {"fields": {"event": event.value, **said}, "for_programs": for_programs}


def fields_of(record: LogRecord) -> Mapping[str, str | int]:
    """Those that a message was logged with."""
    found: Mapping[str, str | int] = getattr(record, "fields", {})
    return found


def is_for_people(record: LogRecord) -> bool:
    """Whether a message is to stand where people read."""
    return not getattr(record, "for_programs", False)
