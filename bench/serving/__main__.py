"""Servers under many clients, measured: load, and kills between turns.

python -m bench.serving load|kills [--help]
"""

from __future__ import annotations

import sys

from ..instrument import commands
from . import kills, load

COMMANDS = {"load": load, "kills": kills}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 1 if a memory was lost or crossed, 2 if a file cannot be used."""
    return commands.run("python -m bench.serving", __doc__.splitlines()[0], COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
