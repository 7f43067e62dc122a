"""A memory one can hold, measured: the operators, sessions and the bank.

python -m bench.memory operators|sessions|bank [--help]
"""

from __future__ import annotations

import sys

from ..instrument import commands
from . import bank, operators, sessions

COMMANDS = {"operators": operators, "sessions": sessions, "bank": bank}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 if a file cannot be used."""
    return commands.run("python -m bench.memory", __doc__.splitlines()[0], COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
