# SPDX-License-Identifier: Apache-2.0
"""What opens a repository, as a user gave it: for us, and for restic's own program."""

from dataclasses import dataclass, field

from qmpbackup.model import Location


@dataclass(frozen=True, slots=True)
class Access:
    """Where a repository lies, and its password."""

    location: Location
    secret: str = field(repr=False)
