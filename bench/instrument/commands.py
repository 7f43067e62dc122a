"""What the command lines share: several commands, each a module, and how a measurement ends."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from . import results
from .rows import Row
from .tables import plain_table


def run(prog: str, description: str, modules: Mapping[str, ModuleType], arguments: list[str] | None) -> int:
    """Run one of ``modules``; returns its exit status: 2 if a file cannot be used.

    Args:
        prog: how it is called, as in ``python -m bench.recall``.
        modules: by command; each has a docstring whose first line is the help, ``DIRECTORY``, where ``--output`` is
            unless given, ``add_arguments(parser)``, and ``run(options)``, which returns the exit status.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in modules.items():
        line = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=line, description=line)
        folder = "folder of the JSON (default: %(default)s)"
        command.add_argument("--output", type=Path, default=module.DIRECTORY, help=folder)
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    name = f"{prog.removeprefix('python -m ')} {options.command}"
    return status_of(name, functools.partial(modules[options.command].run, options))


def status_of(name: str, work: Callable[[], int]) -> int:
    """The exit status that ``work`` returns, or 2 after a line of the command ``name`` that says what is wrong."""
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def roomy_folder(needed: int, directory: Path | None) -> Iterator[Path]:
    """A folder with room for ``needed`` bytes, empty, and gone at the end.

    Args:
        directory: what it is made in; made itself if need be. None: where temporary files lie.

    Raises:
        OSError: the disk has less room.
    """
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"{folder}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        yield Path(folder)


def progress() -> Callable[[str], None]:
    """What prints a line with the seconds since now."""
    start = time.perf_counter()
    return lambda text: print(f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True)


def finish(rows: Sequence[Row], arguments: dict[str, Any], output: Path) -> int:
    """Write what was just measured on a CPU and print it, a table last; the exit status: 1 if a row was refused."""
    result = results.collect(rows, "cpu", arguments)
    path = results.write(output, result)
    print(f"{result.head['device']}, {result.head['cores']} cores, {result.head['threads']} threads")
    print(f"written to {path}\n\n{plain_table(rows)}")
    return int(any(row.status == "refused" for row in rows))
