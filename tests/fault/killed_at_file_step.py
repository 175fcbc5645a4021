# SPDX-License-Identifier: Apache-2.0
"""The product's command, which gets a signal before its step number N on a file system.

`python killed_at_file_step.py SIGNAL N qmpbackup's arguments…`. Steps are what Python's audit events tell:
files created, renamed, removed, truncated, folders made and removed. (Writes and fsync have none; what
differs between two events is seen by nobody unless the machine itself goes down.)
"""

import os
import sys

STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def creates(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether an event is the opening of a file that may not exist yet."""
    flags = arguments[2] if event == "open" and len(arguments) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY))


def main() -> None:
    """Count, be signalled, or run to the end."""
    number, left = int(sys.argv[1]), int(sys.argv[2])

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in STEPS or creates(event, arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    from qmpbackup.cli.main import qmpbackup

    sys.argv[1:] = sys.argv[3:]
    sys.dont_write_bytecode = True
    sys.addaudithook(hook)
    try:
        qmpbackup()
    finally:
        if left > 0:
            print("no such file step", file=sys.stderr)


if __name__ == "__main__":
    main()
