# SPDX-License-Identifier: Apache-2.0
"""How long tests wait for what must come: so long that only what never comes is late, however busy
the machine is. Where nothing is wrong, nobody waits as long."""

import time
from collections.abc import Callable

PATIENCE = 300.0


def wait_until(holds: Callable[[], object], what: str = "it") -> None:
    """Ask again and again until something holds. Raises `AssertionError` where it never does."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come to pass"
        time.sleep(0.005)
