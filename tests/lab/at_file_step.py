# SPDX-License-Identifier: Apache-2.0
"""A command of the product, which gets a signal before one of its steps on a file system.

`python at_file_step.py SIGNAL STEP PROGRAM its arguments…`, where STEP is a number, or a pattern for what the
first step that is meant does: `rename FULL-1 FULL-1.old`. Steps are what Python's audit events tell: files
created, renamed, removed, truncated, folders made and removed. (Writes and fsync have none; what differs
between two events is seen by nobody unless the machine itself goes down.)
"""

import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def is_step(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether an event is a step, and not about a file that is in memory alone."""
    if event not in STEPS:
        return creates(event, arguments)
    file = arguments[0] if arguments else None
    in_memory = isinstance(file, int) and Path(f"/proc/self/fd/{file}").readlink().match("/memfd:*")
    return not in_memory


def creates(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether an event is the opening of a file that may not exist yet."""
    flags = arguments[2] if event == "open" and len(arguments) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY))


def text(event: str, arguments: tuple[object, ...]) -> str:
    """What a step does, with the names that it is about."""
    names = (each for each in arguments if isinstance(each, str))
    return " ".join([event.removeprefix("os."), *names])


def meaning(step: str) -> Callable[[int, str], bool]:
    """Whether a step, the so-manieth, is the one that is meant."""
    if step.isdigit():
        return lambda count, _: count == int(step)
    return lambda _, does: re.fullmatch(step, does) is not None


def main() -> None:
    """Count, be signalled, or run to the end."""
    number, meant, count = int(sys.argv[1]), meaning(sys.argv[2]), 0
    over = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count, over
        if over or not is_step(event, arguments):
            return
        count += 1
        over = meant(count, text(event, arguments))
        if over:
            os.kill(os.getpid(), number)

    (program,) = entry_points(group="console_scripts", name=sys.argv[3])
    command = program.load()
    sys.argv[1:] = sys.argv[4:]
    sys.dont_write_bytecode = True
    sys.addaudithook(hook)
    try:
        command()
    finally:
        if not over:
            print("no such file step", file=sys.stderr)


if __name__ == "__main__":
    main()
