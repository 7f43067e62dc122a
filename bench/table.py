"""Print results as Markdown.

python -m bench.table FILE...
"""

from __future__ import annotations

import argparse
from typing import Any

from deltamem_fast.files import read_json

from .rows import markdown_table


def heading(result: dict[str, Any]) -> str:
    """What was measured on, in a line."""
    commit = result["commit"] or "unknown"
    if result["dirty"]:
        commit += " with changes"
    versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "transformers", "numba") if result[name])
    machine = f"**{result['device']}**, {result['cores']} cores, {result['threads']} threads"
    return f"{machine}; {versions}; commit {commit}; {result['date']}"


def main(arguments: list[str] | None = None) -> None:
    """Print a heading and a table for each file."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description="Benchmark results as Markdown.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON that python -m bench wrote")
    for path in parser.parse_args(arguments).files:
        result = read_json(path)
        print(heading(result) + "\n\n" + markdown_table(result["rows"]) + "\n")


if __name__ == "__main__":
    main()
