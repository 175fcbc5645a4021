# SPDX-License-Identifier: Apache-2.0
"""What a bad disk does to files."""

from pathlib import Path


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file, which may be write-protected; negative offsets count from its end."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        place = offset if offset >= 0 else path.stat().st_size + offset
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ 1]))
