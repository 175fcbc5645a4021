# SPDX-License-Identifier: Apache-2.0
"""Writes what a package holds beside the code, from the code: pages for `man`, completions for bash,
zsh and fish, and a configuration in which everything is commented out.

    pages.py FOLDER     with the package's own Python modules to be imported
"""

import argparse
import contextlib
import gzip
import io
import sys
from collections.abc import Mapping
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from qmpbackup import __version__
from qmpbackup.cli.main import _parser, run
from qmpbackup.cli.original import qmprebase_parser, qmprestore_parser

PURPOSE = {
    "qmpbackup": "live full and incremental backups of running QEMU virtual machines",
    "qmprebase": "merge chains of backup images",
    "qmprestore": "merge and restore chains of backup images",
}
COMPLETIONS = {
    "bash": "bash-completion/completions/{}",
    "zsh": "zsh/vendor-completions/_{}",
    "fish": "fish/vendor_completions.d/{}.fish",
}
NO_CONFIGURATION = "# See https://toml.io for the form of this file.\n"


def man_page(parser: argparse.ArgumentParser) -> str:
    """The page of one command in section 1."""
    name = parser.prog
    parser.man_short_description = PURPOSE[name]
    page = str(Manpage(parser))
    head = f'.TH {name.upper()} "1" "" "qmpbackup {__version__}" "User Commands"'
    lines = page.splitlines()
    lines[next(i for i, line in enumerate(lines) if line.startswith(".TH"))] = head
    return "\n".join(lines) + "\n"


def example() -> str:
    """What `qmpbackup config example` prints, commented out; a table says what it is for anyway."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = run(lambda: _parser(["config", "example"]), ["config", "example"])
        except SystemExit as error:
            code = int(error.code or 0)
    lines = said.getvalue().splitlines() if code == 0 else NO_CONFIGURATION.splitlines()
    return "".join(f"{_commented(line)}\n" for line in lines)


def _commented(line: str) -> str:
    return line if not line.strip() or line.startswith("#") else f"#{line}"


def write(folder: Path, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    """All of it, at the places of the system."""
    for name, parser in parsers.items():
        page = folder / "usr/share/man/man1" / f"{name}.1.gz"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(gzip.compress(man_page(parser).encode(), 9, mtime=0))
        for shell, place in COMPLETIONS.items():
            file = folder / "usr/share" / place.format(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(shtab.complete(parser, shell) + "\n")
    configuration = folder / "etc/qmpbackup/config.toml"
    configuration.parent.mkdir(parents=True, exist_ok=True)
    configuration.write_text(example())


if __name__ == "__main__":
    all_parsers = (_parser([]), qmprebase_parser(), qmprestore_parser())
    write(Path(sys.argv[1]), {parser.prog: parser for parser in all_parsers})
