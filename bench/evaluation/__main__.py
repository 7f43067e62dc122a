"""Benchmarks of long texts on SmolLM2 and on the small backbone, each row a context policy with a memory or without.

python -m bench.evaluation COMMAND [--help]
"""

from __future__ import annotations

import sys

from ..instrument import commands
from . import embedder, locomo, small

COMMANDS = {"embedder": embedder, "locomo": locomo, "small": small}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 2 if a file cannot be used."""
    description = "Benchmarks of long texts under context policies, with and without a memory."
    return commands.run("python -m bench.evaluation", description, COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
