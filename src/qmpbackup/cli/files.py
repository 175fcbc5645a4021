# SPDX-License-Identifier: Apache-2.0
"""`qmpbackup files`: files out of a point."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qmpbackup.cli import files_asked
from qmpbackup.cli.arguments import (
    add_disks,
    add_lock_wait,
    add_point,
    add_target,
    add_vm,
    names,
    path,
)
from qmpbackup.cli.printing import say

if TYPE_CHECKING:
    from qmpbackup.service.files.reading import Place, Reading


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command, its commands and their options."""
    parser = commands.add_parser(
        "files",
        help="list, print, copy out and find files in a point",
        description="Files out of a restore point, without root. The file systems are read by a small Linux "
        "in a machine without a network, which is thrown away afterwards; journals are replayed there. "
        "Nothing of the point is changed.",
    )
    ours = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    files_asked.register_ls(
        _command(ours, "ls", _ls, "show the file systems, or what is in a folder")
    )
    printing = _command(ours, "cat", _cat, "print a file")
    printing.add_argument("place", metavar="PATH", help=files_asked.PLACE_HELP)
    files_asked.register_cp(
        _command(ours, "cp", _cp, "copy a file, or with -r a folder, to this host")
    )
    packing = _command(ours, "tar", _tar, "a tar archive of a file or a folder, with all metadata")
    packing.add_argument("place", metavar="PATH", help=files_asked.PLACE_HELP)
    packing.add_argument(
        "-f", "--file", type=path, metavar="FILE", help="write it here (default: standard output)"
    )
    files_asked.register_find(
        _command(ours, "find", _find, "find files by name, below a folder or everywhere")
    )
    shell = _command(ours, "shell", _shell, "several of these, of one point that is opened once")
    shell.description = (
        "Take commands from standard input, one a line: ls, cd, pwd, cat, cp, find, help, exit. The point is "
        "opened once for all of them. What fails is said, and the next line follows; the exit code is that of "
        "the first that failed."
    )
    preparing = ours.add_parser(
        "prepare",
        help="make the appliance anew, of the newest packages",
        description="Make the appliance that reads file systems, of Debian's newest packages, and print "
        "its folder. `files` makes it by itself when it is first needed. On a host that cannot, copy that "
        "folder to the same place in the home of the user.",
    )
    preparing.add_argument(
        "--if-missing",
        action="store_true",
        help="only if it is not there, as `files` does by itself",
    )
    preparing.set_defaults(run=_prepare)


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Any,
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_target(parser)
    add_vm(parser)
    add_point(parser)
    add_disks(parser)
    parser.add_argument(
        "--passphrase-file",
        type=path,
        metavar="FILE",
        help="a file with the passphrase of what is encrypted by LUKS",
    )
    add_lock_wait(parser)
    parser.set_defaults(run=run)
    return parser


@contextmanager
def _reading(arguments: argparse.Namespace) -> "Iterator[Reading]":
    from qmpbackup.service.files.reading import Request, reading

    request = Request(
        target=arguments.target,
        point=arguments.point,
        vm=arguments.vm,
        disks=names(arguments.disk),
        passphrase=arguments.passphrase_file,
        lock_wait=arguments.lock_wait,
    )
    with reading(request) as found:
        yield found


# ls and find


def _ls(arguments: argparse.Namespace) -> int:
    with _reading(arguments) as found:
        if arguments.place:
            files_asked.show_entries(found, found.place(arguments.place), arguments)
        else:
            files_asked.show_systems(found, as_json=arguments.json)
    return 0


def _find(arguments: argparse.Namespace) -> int:
    with _reading(arguments) as found:
        for place in _places(found, arguments.place):
            files_asked.search(found, place, arguments)
    return 0


def _places(found: "Reading", wanted: str) -> "Iterable[Place]":
    from qmpbackup.service.files.reading import Place

    if wanted:
        return [found.place(wanted)]
    return [Place(each, "/") for each in found.readable()]


# cat, tar and cp


def _cat(arguments: argparse.Namespace) -> int:
    with _reading(arguments) as found:
        files_asked.write(1, found.contents(found.place(arguments.place)))
    return 0


def _tar(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.files.archives import checked, new_file

    if arguments.file is None:
        with _reading(arguments) as found:
            files_asked.write(1, checked(found.archive(found.place(arguments.place))))
        return 0
    with new_file(arguments.file) as fd, _reading(arguments) as found:
        files_asked.write(fd, checked(found.archive(found.place(arguments.place))))
    return 0


def _cp(arguments: argparse.Namespace) -> int:
    from qmpbackup.service.files.copying import require_possible

    require_possible(arguments.destination, files_asked.wishes(arguments))
    with _reading(arguments) as found:
        return files_asked.copy_out(found, found.place(arguments.place), arguments)


# shell and prepare


def _shell(arguments: argparse.Namespace) -> int:
    from qmpbackup.cli.files_shell import FilesShell

    with _reading(arguments) as found:
        return FilesShell(found).run()


def _prepare(arguments: argparse.Namespace) -> int:
    from qmpbackup.machine.appliance.building import appliance

    say(str(appliance(anew=not arguments.if_missing).folder))
    return 0
