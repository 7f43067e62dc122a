"""One command line of several commands, each a module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from types import ModuleType


def run(prog: str, description: str, modules: Mapping[str, ModuleType], arguments: list[str] | None) -> int:
    """Run one of ``modules``; returns its exit status: 2 if a file cannot be used.

    Args:
        prog: how it is called, as in ``python -m bench.recall``.
        modules: by command; each has a docstring whose first line is the help, ``add_arguments(parser)``, and
            ``run(options)``, which returns the exit status.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in modules.items():
        line = module.__doc__.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=line, description=line))
    options = parser.parse_args(arguments)
    try:
        return modules[options.command].run(options)
    except (ValueError, OSError) as error:
        print(f"{prog.removeprefix('python -m ')} {options.command}: error: {error}", file=sys.stderr)
        return 2
