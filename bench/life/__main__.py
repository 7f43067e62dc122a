"""A long life, measured: does anything drift, grow, slow down or get lost?

python -m bench.life tokens|session|bank [--help]
"""

from __future__ import annotations

import sys

from ..instrument import commands
from . import bank, session, tokens

COMMANDS = {"tokens": tokens, "session": session, "bank": bank}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 1 if something drifted or was lost, 2: a file cannot be used."""
    return commands.run("python -m bench.life", __doc__.splitlines()[0], COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
