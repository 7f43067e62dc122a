"""The operators, sessions and the bank: measured, and written into README.

python -m bench.holding COMMAND [--help]
"""

from __future__ import annotations

import sys

from .. import commands
from . import operators, readme, sessions

COMMANDS = {"operators": operators, "sessions": sessions, "readme": readme}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 if a file cannot be used."""
    return commands.run("python -m bench.holding", __doc__.splitlines()[0], COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
