"""The command ``deltamem``: info, convert, demo, chat, ingest, inspect, serve, train, eval."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from ..display import printable
from ..errors import DeltaMemError, file_error
from ..version import __version__
from . import chat, convert, demo, eval, info, ingest, inspect, serve, train

COMMANDS = (info, convert, demo, chat, ingest, inspect, serve, train, eval)  # in the order of the help text
DEBUG = "DELTAMEM_DEBUG"
# Exit codes.
USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: the demo found something that does not hold. 2: wrong usage, or an error, told in one line on stderr;
    with DELTAMEM_DEBUG set to something, an error shows its traceback. 130: interrupted.
    """
    _open_closed_streams()
    # A pipe may have an encoding that lacks a character of a conversation; that must not end the command.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _warnings_on_stderr():
            code = _run(argv)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise file_error(error, "output", "stdout") from error
        return code
    except BrokenPipeError:
        _close_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        _tell("error", _in_words(error))
        if isinstance(error, OSError):
            _close_stdout()  # it may be stdout that is full: what it holds cannot go anywhere
        return USER_ERROR


def _in_words(error: Exception) -> str:
    """An error in one line; one that nobody has foreseen with its type and its place."""
    text = " ".join(str(error).split())
    if isinstance(error, DeltaMemError) or (text and type(error) in (ValueError, TypeError)):
        return text
    if isinstance(error, OSError):
        reason = error.strerror or text or type(error).__name__
        return reason if error.filename is None else f"{error.filename}: {reason}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({text})" if text else "out of memory"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parents[1])]
    frame = (ours or frames)[-1]
    return (
        f"{type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno}; this should have been said "
        f"better: please report it, with what {DEBUG}=1 shows)"
    )


def _tell(kind: str, message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        # Files and arguments are quoted in it: no escape sequence of theirs reaches the terminal.
        print(f"deltamem: {kind}: {printable(message)}", file=sys.stderr, flush=True)


class _OneLine(logging.Handler):
    """Warnings of this package, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        _tell(record.levelname.lower(), " ".join(record.getMessage().split()))


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("deltamem_fast"), _OneLine(logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False  # nor a second time by whatever the root has
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _run(argv: list[str] | None) -> int:
    usage = parser()
    try:
        arguments = usage.parse_args(argv)
    except SystemExit as end:  # --help, --version, wrong usage: argparse has said it
        return int(end.code or 0)
    if arguments.command is None:
        usage.print_help(sys.stderr)
        return USER_ERROR
    return arguments.command(arguments)


def _open_closed_streams() -> None:
    """Python leaves None for streams that were closed before it started."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _close_stdout() -> None:
    # Python flushes stdout once more at exit, which would fail again and say so.
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, each of which sets ``command``, what is run."""
    parser = argparse.ArgumentParser(
        prog="deltamem",
        description="An online 8×8 memory for frozen language models: what is installed, adapter files, a demo, a "
        "chat, and looking inside.",
    )
    parser.add_argument("--version", action="version", version=f"deltamem-fast {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    for command in COMMANDS:
        command.add_command(commands)
    return parser
