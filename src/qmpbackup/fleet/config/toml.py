# SPDX-License-Identifier: Apache-2.0
"""Values as TOML writes them, on one line."""

import json
import re
from typing import Any, Final

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def toml(value: Any) -> str:
    """A value, as it may stand behind the `=` of a key."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            parts = (f"{name(key)} = {toml(each)}" for key, each in value.items())
            return f"{{ {', '.join(parts)} }}" if value else "{}"
        case _:
            return str(value)


def name(key: str) -> str:
    """A key, as it may stand before the `=`."""
    return key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)
