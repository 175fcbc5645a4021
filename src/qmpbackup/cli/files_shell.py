# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup files shell`: commands of `files`, one a line, on a point that is opened once.

At a terminal there is a prompt, names are completed, and what a file holds is printed without anything
that a terminal would obey. Else lines are read, and what is printed is for programs.
"""

import argparse
import logging
import os
import posixpath
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import NoReturn

from qmpbackup import interrupt
from qmpbackup.cli import files_asked
from qmpbackup.cli.failures import explained
from qmpbackup.cli.printing import printable, say
from qmpbackup.errors import DamagedError, NoSuchTarget, QmpBackupError, StorageError, UsageError
from qmpbackup.service.files.copying import Wishes, require_possible
from qmpbackup.service.files.reading import Place, Reading

log = logging.getLogger(__name__)

_HELP = """\
ls [-l] [PATH]                    what is in a folder; at the top, the file systems
cd [PATH]                         go into a folder, or a file system (vda:part1:); without PATH, to the top
pwd                               where we are
cat PATH                          print a file
cp [-r] PATH DEST                 copy to this host; cp --help says more
find [--name GLOB] [--type f|d|l] [PATH]
help, exit"""

_GOES_ON = (UsageError, NoSuchTarget, StorageError, DamagedError)
"""What a line may fail with without an end of all."""


_MOST_COMPLETED = 10_000


class _LineParser(argparse.ArgumentParser):
    """Options of one line: what is wrong with them ends that line, and nothing else."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}.", f"`{self.prog} --help` says how.")

    def exit(self, *_: object) -> NoReturn:
        raise _LineOver


class _LineOver(Exception):
    """There is nothing more to do for a line."""


class FilesShell:
    """The shell: where it is in the guest's file systems, and how its lines ended."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._place: Place | None = None
        self._code = 0
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[Sequence[str]], int]] = {
            "ls": self._ls,
            "cd": self._cd,
            "pwd": self._pwd,
            "cat": self._cat,
            "cp": self._cp,
            "find": self._find,
            "help": self._help,
        }

    def run(self) -> int:
        """Take lines until there are no more, or one says `exit`; the exit code of the first that failed."""
        for line in self._asked() if self._is_terminal else _lines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError as error:
                self._note(*explained(UsageError(f"A line cannot be understood: {error}.")))
                continue
            if words and words[0] in {"exit", "quit"}:
                break
            if words:
                self._one(words)
        return self._code

    def _one(self, words: Sequence[str]) -> None:
        try:
            command = self._commands.get(words[0])
            if command is None:
                raise UsageError(
                    f"There is no command {words[0]!r}.", "`help` shows what there is."
                )
            self._note([], command(words[1:]))
        except _LineOver:
            pass
        except _GOES_ON as error:
            self._note(*explained(error))

    def _note(self, sentences: Sequence[str], code: int) -> None:
        for each in filter(None, sentences):
            log.error("%s", each)
        self._code = self._code or code

    # The commands

    def _ls(self, words: Sequence[str]) -> int:
        arguments = _parsed("ls", files_asked.register_ls, words)
        if not arguments.place and self._place is None:
            files_asked.show_systems(self._reading, as_json=arguments.json)
        else:
            files_asked.show_entries(self._reading, self._at(arguments.place), arguments)
        return 0

    def _cd(self, words: Sequence[str]) -> int:
        (word,) = _exactly("cd", words or [""], 1)
        if not word:
            self._place = None
            return 0
        place = self._at(word)
        if not self._reading.is_folder(place):
            raise UsageError(f"{place.shown} is no folder.")
        self._place = Place(place.system, posixpath.normpath(place.path))
        return 0

    def _pwd(self, words: Sequence[str]) -> int:
        _exactly("pwd", words, 0)
        say(printable(self._place.shown) if self._place else "")
        return 0

    def _cat(self, words: Sequence[str]) -> int:
        (word,) = _exactly("cat", words, 1)
        pieces = self._reading.contents(self._at(word))
        files_asked.write(1, _harmless(pieces) if self._is_terminal else pieces)
        return 0

    def _cp(self, words: Sequence[str]) -> int:
        arguments = _parsed("cp", files_asked.register_cp, words)
        place = self._at(arguments.place)
        require_possible(arguments.destination, Wishes(preserve=arguments.preserve))
        if not arguments.recursive and self._reading.is_folder(place):
            raise UsageError(f"{place.shown} is a folder.", "Copy it with -r.")
        return files_asked.copy_out(self._reading, place, arguments)

    def _find(self, words: Sequence[str]) -> int:
        arguments = _parsed("find", files_asked.register_find, words)
        if arguments.place or self._place:
            files_asked.search(self._reading, self._at(arguments.place), arguments)
        else:
            for each in self._reading.readable():
                files_asked.search(self._reading, Place(each, "/"), arguments)
        return 0

    def _help(self, words: Sequence[str]) -> int:
        del words
        say(_HELP)
        return 0

    def _at(self, word: str) -> Place:
        """What a path means here."""
        names = [each.name for each in self._reading.systems]
        if self._place is None or any(word == n or word.startswith(f"{n}:") for n in names):
            is_relative = not word.startswith("/") and ":" not in word and word not in names
            return self._reading.place(f"/{word}" if is_relative else word)
        return Place(self._place.system, posixpath.join(self._place.path, word))

    # At a terminal

    def _asked(self) -> Iterator[str]:
        """What is typed, line by line."""
        with suppress(ImportError):
            import readline

            readline.set_completer(self._completed)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")
        while True:
            where = printable(self._place.shown) if self._place else self._reading.point.id
            try:
                with interrupt.let_through():
                    line = input(f"{where}> ")
            except EOFError:
                say("")
                return
            yield line

    def _completed(self, text: str, number: int) -> str | None:
        """One after the other of the words that begin so, as readline asks for them."""
        with suppress(QmpBackupError):
            if number == 0:
                self._candidates = list(self._beginning(text))
            return self._candidates[number] if number < len(self._candidates) else None
        return None

    def _beginning(self, text: str) -> Iterable[str]:
        above, slash, begun = text.rpartition("/")
        if not slash and self._place is None:
            names = [f"{each.name}:/" for each in self._reading.systems if each.is_readable]
            return [each for each in (*self._commands, *names) if each.startswith(text)]
        commands = [] if slash else [each for each in self._commands if each.startswith(text)]
        place = self._at(above + slash) if slash else self._at("")
        if not self._reading.is_folder(place):
            return commands
        found = [
            f"{above}{slash}{os.fsdecode(each.path)}{'/' if each.kind == 'd' else ''}"
            for each in islice(self._reading.entries(place), _MOST_COMPLETED)
            if os.fsdecode(each.path).startswith(begun)
        ]
        return [*commands, *(each for each in sorted(found) if shlex.quote(each) == each)]


def _lines() -> Iterator[str]:
    """Lines of standard input."""
    while True:
        with interrupt.let_through():
            line = sys.stdin.buffer.readline()
        if not line:
            return
        yield os.fsdecode(line)


def _parsed(
    name: str, register: Callable[[argparse.ArgumentParser], None], words: Sequence[str]
) -> argparse.Namespace:
    parser = _LineParser(prog=name)
    register(parser)
    return parser.parse_args(list(words))


def _exactly(name: str, words: Sequence[str], count: int) -> Sequence[str]:
    if len(words) != count:
        raise UsageError(f"{name} takes {count or 'no'} path{'' if count == 1 else 's'}.")
    return words


def _harmless(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Text without anything that a terminal would obey."""
    for piece in pieces:
        text = piece.decode("utf-8", "backslashreplace")
        yield "".join(c if c in "\n\t" else printable(c) for c in text).encode()
