# SPDX-License-Identifier: Apache-2.0
"""How a demonstration runs: in a folder that is gone afterwards, whatever happens."""

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class DemoFailed(Exception):
    """The product did not do what the demonstration shows."""


def demonstrated(show: Callable[[Path], None]) -> int:
    """Run a demonstration, which gets the folder; its exit code."""
    signal.signal(signal.SIGTERM, _end)
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="qmpbackup-demo-") as folder:
            show(Path(folder))
    except KeyboardInterrupt:
        return 130
    except (DemoFailed, AssertionError, OSError) as error:
        print(f"demo: failed: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    print(f"{time.monotonic() - begun:5.1f} s  in all. Nothing of it is left.")
    return 0


def _end(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)
