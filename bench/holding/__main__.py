"""The operators, sessions and the bank: measured, and written into README.

python -m bench.holding COMMAND [--help]
"""

from __future__ import annotations

import argparse
import sys

from . import operators, readme, sessions

# Each has a docstring whose first line is the help, add_arguments(parser), and run(options) -> exit status.
COMMANDS = {"operators": operators, "sessions": sessions, "readme": readme}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 if a file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m bench.holding", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        line = module.__doc__.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=line, description=line))
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, OSError) as error:
        print(f"bench.holding: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
