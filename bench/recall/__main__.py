"""Recall of the shipped weights, measured. ``python -m examples.recall`` trains such weights.

python -m bench.recall COMMAND [--help]
"""

from __future__ import annotations

import sys

from ..instrument import commands
from . import curves, fading, recipe, released, smollm2, trust

COMMANDS = {
    "curves": curves, "fading": fading, "recipe": recipe, "released": released, "smollm2": smollm2, "trust": trust,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 if a file cannot be used."""
    return commands.run("python -m bench.recall", "Recall of the shipped weights.", COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
