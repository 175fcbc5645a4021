# SPDX-License-Identifier: Apache-2.0
"""The three commands: options that all share, logging, and the mapping of errors to exit codes."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn

from qmpbackup import __version__, interrupt
from qmpbackup.cli.arguments import Parser, add_shared_options
from qmpbackup.cli.log_fields import is_for_people
from qmpbackup.cli.printing import drop_output, printable
from qmpbackup.errors import Interrupted

Run = Callable[[argparse.Namespace], int]

EXIT_CODES = """\
exit codes:
  0 done · 1 failed · 2 wrong usage · 3 done but degraded · 4 an incremental is not possible
  5 quiesce failed · 6 QMP, NBD or VM · 7 target or storage · 8 damaged data
  9 an audit found unrecorded changes · 10 no such target · 11 locked by another run · 12 wrong password
  13 the VM is off: nobody listens at its socket · 14 some of a run failed · 129/130/143 interrupted"""

EXAMPLES = """\
examples:
  qmpbackup --socket /run/vm.qmp backup --level auto --target /backup/vm
  qmpbackup --socket /run/vm.qmp --agent-socket /run/vm.qga backup --level inc --quiesce \\
      --target /backup/vm
  qmpbackup list --target /backup/vm
  qmpbackup restore --target /backup/vm --output /restore
"""


def qmpbackup() -> NoReturn:
    """Entry point of `qmpbackup`."""
    _leave(run(lambda: _parser(sys.argv[1:]), sys.argv[1:]))


def _leave(code: int) -> NoReturn:
    """End the process.

    Threads of obstore may still be at work for a server that was given up; where one of them comes to
    ask for Python while that ends, the whole process is aborted in place of its exit code.
    """
    if "obstore" in sys.modules:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def qmprebase() -> NoReturn:
    """Entry point of `qmprebase`."""
    from qmpbackup.cli.original import qmprebase_parser

    sys.exit(run(qmprebase_parser, sys.argv[1:]))


def qmprestore() -> NoReturn:
    """Entry point of `qmprestore`."""
    from qmpbackup.cli.original import qmprestore_parser

    sys.exit(run(qmprestore_parser, sys.argv[1:]))


def run(parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str]) -> int:
    """Parse and carry out one command line; return its exit code."""
    _mend_streams()
    arguments = _parsed(parser, argv)
    if arguments is None:
        return 1
    from qmpbackup.cli.failures import explained  # while there are descriptors for it

    debug = bool(getattr(arguments, "debug", False))
    for number in interrupt.heeded():
        signal.signal(number, _interrupt)
    try:
        _set_up_logging(arguments, debug)
        command: Run = arguments.run
        code = command(arguments)
    except Interrupted as error:
        return _report([str(error)], error.exit_status, debug, error)
    except BrokenPipeError:
        return 1  # whoever read our output has gone
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - one sentence instead of a traceback
        return _report(*explained(error), debug, error)
    return code


def _parsed(
    parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str]
) -> argparse.Namespace | None:
    """The arguments; `None` where help was asked for and could not be printed to its end."""
    try:
        try:
            return parser().parse_args(argv)
        finally:  # help is printed, and ends the program, inside; from Python 3.12 on unflushed
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError):
            print(f"error: The help cannot be printed: {error.strerror}.", file=sys.stderr)
        return None


def _mend_streams() -> None:
    """Make standard streams usable whatever they are.

    Where one was closed, the next file that we open would get its number, and what is printed would
    go into a backup. Letters that an encoding does not know are no reason to fail.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(fd, True)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - stays open
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def _report(sentences: Sequence[str], code: int, debug: bool, error: BaseException) -> int:
    log = logging.getLogger("qmpbackup")
    for sentence in filter(None, sentences):
        log.error("%s", sentence)
    if debug:
        log.debug("Where it came from:", exc_info=error)
    return code


def _set_up_logging(arguments: argparse.Namespace, debug: bool) -> None:
    logging.raiseExceptions = False  # a log that cannot be written must not end a backup
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(_formatter(arguments))
    if isinstance(terminal.formatter, _Plain):
        terminal.addFilter(is_for_people)
    log = logging.getLogger("qmpbackup")
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False
    log.handlers[:] = [_journal_or(terminal)]
    _keep_others_quiet(log)
    logfile = getattr(arguments, "logfile", None)
    if logfile:
        log.addHandler(_file_handler(logfile))
    if getattr(arguments, "syslog", False):
        log.addHandler(_syslog_handler())


def _journal_or(terminal: logging.Handler) -> logging.Handler:
    """Where standard error leads to the journal, sentences go there with their fields."""
    if "JOURNAL_STREAM" not in os.environ or not isinstance(terminal.formatter, _Plain):
        return terminal
    from qmpbackup.cli.journal import JournalHandler, is_journal

    if is_journal(sys.stderr):
        with suppress(OSError):  # sentences alone, where there is no descriptor for more
            handler = JournalHandler(instead=terminal)
            handler.setFormatter(_OneLine())
            return handler
    return terminal


def _formatter(arguments: argparse.Namespace) -> logging.Formatter:
    if getattr(arguments, "log_format", "text") == "text":
        return _Plain()
    from qmpbackup.cli.json_log import JsonLines

    return JsonLines()


def _keep_others_quiet(log: logging.Logger) -> None:
    """What Python, asyncio and libraries would print on their own is for `--debug`, in our form."""
    for name in ("asyncio", "qemu"):
        logging.getLogger(name).handlers[:] = [logging.NullHandler()]
        logging.getLogger(name).propagate = False
    threading.excepthook = lambda args: log.debug(
        "A thread ended:",
        exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback),
    )
    sys.unraisablehook = lambda args: log.debug(
        "Passed over:",
        exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback),
    )


class _OneLine(logging.Formatter):
    """Keeps each message on its line, whatever names are in it, and lets no terminal obey a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the library's name
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class _Plain(_OneLine):
    """`warning: …` and `error: …`; plain sentences for what is only information."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


class _LogFile(logging.FileHandler):
    """Says once that it cannot be written, and lets the run go on."""

    _complained = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        del record
        if not self._complained:
            self._complained = True
            reason = sys.exc_info()[1]
            logging.getLogger("qmpbackup").warning(
                "The log file %s cannot be written: %s", self.baseFilename, reason
            )


def _file_handler(path: str) -> logging.Handler:
    from qmpbackup.errors import StorageError

    try:
        handler = _LogFile(path)
    except OSError as error:
        raise StorageError(
            f"Cannot write the log file {path}: {error.strerror}.", "Check --logfile."
        ) from error
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    return handler


def _syslog_handler() -> logging.Handler:
    from logging.handlers import SysLogHandler

    from qmpbackup.errors import UsageError

    if not os.path.exists("/dev/log"):  # noqa: PTH110 - one test, no pathlib at start-up
        raise UsageError("There is no syslog socket /dev/log.", "Leave out --syslog.")
    handler = SysLogHandler(address="/dev/log")
    handler.setFormatter(_OneLine("qmpbackup: %(message)s"))
    return handler


COMMANDS = {
    "init": "init",
    "config": "config",
    "backup": "backup",
    "info": "info",
    "cleanup": "info",
    "recover": "info",
    "doctor": "doctor",
    "list": "listing",
    "show": "show",
    "verify": "verify",
    "restore": "restore",
    "serve": "serve",
    "mount": "mount",
    "files": "files",
    "boot": "boot",
    "settle": "settle",
    "drill": "drill",
    "prune": "prune",
    "sweep": "sweep",
    "status": "status",
    "history": "history",
    "notify": "notify",
    "run": "run",
}
"""Each command, and the module of `qmpbackup.cli` that has it."""


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line: only the command that it names, else all of them.

    Building the parsers of all commands takes longer than all the rest of a small run.
    """
    named = [module for command, module in COMMANDS.items() if command in argv]
    parser = Parser(
        prog="qmpbackup",
        description="Live full and incremental backups of running QEMU virtual machines.",
        epilog=f"{EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qmpbackup {__version__}")
    parser.add_argument(
        "--socket", metavar="S", help="QMP socket of the VM: a path, or tcp:HOST:PORT"
    )
    parser.add_argument(
        "--agent-socket", metavar="A", help="socket of the VM's guest agent, for --quiesce"
    )
    add_shared_options(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in dict.fromkeys(named or COMMANDS.values()):
        import_module(f"qmpbackup.cli.{module}").register(commands)
    return parser
