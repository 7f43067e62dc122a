"""Write docs/results and README's rows from the newest results, or check them.

python -m bench.report [--check]        --check: change nothing, exit 1 with the difference if something is out of date
"""

from __future__ import annotations

import argparse
import difflib
import functools
import sys
from pathlib import Path

from ..instrument import commands, machine, results
from . import pages, plots
from .found import PICTURES, find

README = machine.ROOT / "README.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def updated(text: str, new: str) -> str:
    """README's ``text`` with what lies between the markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{README.name}: allowed once each and in order: {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def outdated(new: dict[Path, str]) -> str:
    """What differs between the files and what they should hold, or ""."""
    said = []
    for path, text in new.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        said += difflib.unified_diff(old.splitlines(), text.splitlines(), path.name, "from results", lineterm="")
    return "\n".join(said)


def main(arguments: list[str] | None = None) -> int:
    """Write or check; the exit status is 1 if ``--check`` found a difference, 2 if a file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="folder of the JSON")
    parser.add_argument("--output", type=Path, default=PICTURES.parent, help="folder of the pages and pictures")
    return commands.status_of("bench.report", functools.partial(run, parser.parse_args(arguments)))


def run(options: argparse.Namespace) -> int:
    """Write or check."""
    found = find(options.results, options.output / PICTURES.name)
    if not options.check:
        options.output.mkdir(parents=True, exist_ok=True)
        for path in plots.draw(found):
            print(path)
    new = {options.output / name: text for name, text in pages.written(found).items()}
    new[README] = updated(README.read_text(encoding="utf-8"), pages.readme_rows(found))
    if options.check:
        difference = outdated(new)
        if difference:
            print(f"{difference}\n\nnot what the results say: make docs")
        return int(bool(difference))
    for path, text in new.items():
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
