"""A memory one can hold, measured: the operators, sessions, the bank and the guard.

python -m bench.memory operators|sessions|bank|guard [--help]
"""

from __future__ import annotations

import sys

from ..instrument import commands
from . import bank, guard, operators, sessions

COMMANDS = {"operators": operators, "sessions": sessions, "bank": bank, "guard": guard}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 if a file cannot be used."""
    return commands.run("python -m bench.memory", __doc__.splitlines()[0], COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
