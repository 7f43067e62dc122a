"""The command ``deltamem``: info, convert, demo, chat, inspect, train."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from ..adapter.files import (
    FORMATS,
    RELEASED_NAME,
    SAFETENSORS_NAME,
    read_adapter,
    read_weights,
    same_bits,
    write_adapter,
)
from ..config import CONFIG_NAME
from ..display import printable
from ..errors import ArgumentError, DeltaMemError, file_error
from ..storage.files import as_path
from ..version import __version__
from .chat import add_chat_command
from .demo import add_demo_command
from .inspect import add_inspect_command
from .train import add_train_command

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
        _say_error(_in_words(error))
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


def _say_error(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        # Files and arguments are quoted in it: no escape sequence of theirs reaches the terminal.
        print(f"deltamem: error: {printable(message)}", file=sys.stderr)


class _OneLine(logging.Handler):
    """Warnings of this package, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            text = printable(" ".join(record.getMessage().split()))
            print(f"deltamem: {record.levelname.lower()}: {text}", file=sys.stderr, flush=True)


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
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as end:  # --help, --version, wrong usage: argparse has said it
        return int(end.code or 0)
    if arguments.command is None:
        parser.print_help(sys.stderr)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deltamem",
        description="An online 8×8 memory for frozen language models: what is installed, adapter files, a demo, a "
        "chat, and looking inside.",
    )
    parser.add_argument("--version", action="version", version=f"deltamem-fast {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    info = commands.add_parser(
        "info",
        help="versions, devices and backends; of a model: which layers run on which path, and why",
        description="Without MODEL: versions, devices, and the backend that each would use. With MODEL: loads it, "
        "patches it, and says how each layer's attention runs (fast: the fused forward; generic: the class's own, "
        "with the reason).",
    )
    info.add_argument("model", metavar="MODEL", nargs="?", help="a model's directory or hub id")
    info.add_argument("--adapter", help="an adapter's directory or hub id (default: fresh parameters)")
    info.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="default: as saved"
    )
    info.add_argument("--device", default="cpu", help="where the model is put (default: %(default)s)")
    info.add_argument("--json", action="store_true", help="one JSON object")
    info.set_defaults(command=_info)

    convert = commands.add_parser("convert", help="rewrite an adapter in another file format, bit for bit")
    convert.add_argument("source", metavar="SOURCE", help="an adapter's directory, or a hub id (owner/name)")
    convert.add_argument("target", metavar="TARGET", help="the directory to write, made if needed")
    convert.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help=f"safetensors: {SAFETENSORS_NAME}; released: {RELEASED_NAME}, as the released code reads it",
    )
    convert.add_argument("--force", action="store_true", help="replace the adapter in a TARGET that is not empty")
    convert.set_defaults(command=_convert)

    add_demo_command(commands)
    add_chat_command(commands)
    add_inspect_command(commands)
    add_train_command(commands)
    return parser


# --- info


def _info(arguments: argparse.Namespace) -> int:
    if arguments.model is not None:
        from ..inspection.model_info import format_facts, load_patched, model_facts

        model = load_patched(arguments.model, arguments.adapter, arguments.dtype, arguments.device)
        facts = model_facts(model)
        print(json.dumps(facts, indent=2) if arguments.json else format_facts(facts))
        return 0
    if arguments.adapter is not None:
        raise ArgumentError("--adapter: given without MODEL, which it belongs to")
    from ..inspection.facts import environment

    facts = environment()
    print(json.dumps(facts, indent=2) if arguments.json else format_environment(facts))
    return 0


def format_environment(facts: dict) -> str:
    """The facts of ``environment()`` as text."""
    rows = [*facts["versions"].items(), ("platform", facts["platform"])]
    for device in facts["devices"]:
        capability = f", capability {device['capability']}" if device["capability"] else ""
        rows.append((f"device {device['device']}", f"{device['name']}{capability}; backend {device['backend']}"))
    kernels = facts["kernels"]
    note = f" ({kernels['note']})" if kernels["note"] else ""
    rows.append(("Triton kernels", (", ".join(kernels["available"]) or "none") + note))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


# --- convert


def _convert(arguments: argparse.Namespace) -> int:
    figures = convert_adapter(arguments.source, arguments.target, arguments.to, force=arguments.force)
    print(f"{figures['directory']}: wrote {' and '.join(figures['files'])}")
    print(
        f"{figures['tensors']:,} tensors, {figures['parameters']:,} parameters, {figures['bytes']:,} bytes; "
        "read back, bit-equal to the source"
    )
    return 0


def convert_adapter(source: str, target: str | os.PathLike, to: str, *, force: bool = False) -> dict:
    """Write the adapter ``source`` (a directory or hub id) into the directory ``target`` in the format ``to``.

    Returns:
        What was written: ``directory``, ``files``, ``tensors``, ``parameters``, ``bytes`` (of all files).

    Raises:
        ValueError: the target is the source, or is not empty and ``force`` is not given; a broken adapter; or what
            was written does not read back bit for bit.
        FileNotFoundError: no adapter there.
    """
    directory = as_path(target, "TARGET")
    _check_target(as_path(source, "SOURCE"), directory, force)
    adapter = read_adapter(source)
    weights = adapter.weights
    write_adapter(directory, adapter.config, weights, to, finite=False)
    _check_written(directory, weights)
    files = [CONFIG_NAME, SAFETENSORS_NAME if to == "safetensors" else RELEASED_NAME]
    return {
        "directory": str(directory),
        "files": files,
        "tensors": len(weights),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "bytes": sum((directory / name).stat().st_size for name in files),
    }


def _check_target(source: Path, target: Path, force: bool) -> None:
    if os.path.realpath(target) == os.path.realpath(source):
        raise ArgumentError(f"TARGET: got {target}, which is SOURCE; allowed another directory")
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"TARGET: got {target}, which is a file; allowed a directory")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ArgumentError(f"TARGET: {target} is not empty; --force replaces the adapter in it")


def _check_written(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    written = read_weights(directory)
    same = written.keys() == weights.keys() and all(same_bits(written[name], weights[name]) for name in weights)
    if not same:
        raise ArgumentError(f"TARGET: {directory} does not read back as it was written")
