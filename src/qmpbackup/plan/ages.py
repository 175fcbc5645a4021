# SPDX-License-Identifier: Apache-2.0
"""Spans of time as people read them. Pure."""

from datetime import timedelta

_DAY = 86400


def age(span: timedelta | float) -> str:
    """A span in its two largest units: `2 d 3 h`, `7 h 02 m`, `5 m 01 s`, `14 s`, `11 d`."""
    seconds = span.total_seconds() if isinstance(span, timedelta) else span
    whole = max(0, round(seconds))
    days, rest = divmod(whole, _DAY)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days >= 10:
        return f"{days} d"
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} m"
    return f"{minutes} m {left:02} s" if minutes else f"{left} s"
