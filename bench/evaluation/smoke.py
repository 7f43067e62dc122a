"""Whether each row that make eval-smoke asks for is there: python -m bench.evaluation.smoke DIRECTORY."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from deltamem_fast.eval.answers import read_answer_file
from deltamem_fast.storage.files import read_json

ALL = ("off", "tsw", "ssw", "msw")
# By the run's directory: tasks × policies × labels, as the Makefile has them; without a document, asked once.
EXPECTED = {
    "smollm2": [
        (
            ("locomo", "memory-agent-bench", "longmemeval-s", "changes"),
            ("nothing", "last-128", "everything", "yarn", "bm25-2"),
            ALL,
        )
    ],
    "harness": [
        (("hotpotqa", "ruler-niah", "ruler-vt", "babilong-qa1"), ("nothing", "everything", "bm25-1"), ("off", "msw")),
        (("babilong-qa1",), ("last-16", "yarn"), ("off", "msw")),
        (("ifeval", "gpqa"), ("nothing",), ("off", "msw")),
    ],
    "recall": [(("changes-small",), ("nothing", "last-32", "everything", "bm25-2"), ALL)],
    "longmemeval": [(("longmemeval-s",), ("nothing", "bm25-2"), ("off",))],
    "dense": [(("locomo",), ("dense-2",), ("off", "msw"))],
    "as-paper": [(("memory-agent-bench-paper",), ("nothing",), ("off", "msw"))],
}


def expected() -> set[str]:
    """Every row as DIRECTORY/TASK/ROW."""
    return {
        f"{name}/{task}/{policy}+{label}"
        for name, products in EXPECTED.items()
        for product in products
        for task, policy, label in itertools.product(*product)
    }


def found(directory: Path) -> set[str]:
    """The rows that have answers and a score for each of them, which may be none where only a judge can tell."""
    rows = set()
    for path in directory.glob("*/scores/*/*.json"):
        run, task, row = path.parts[-4], path.parts[-2], path.stem
        answers = read_answer_file(directory / run / "answers" / task / f"{row}.jsonl")[1]
        if answers and answers.keys() == read_json(path)["scores"].keys():
            rows.add(f"{run}/{task}/{row}")
    return rows


def main(directory: Path) -> int:
    """Say what is missing, or there though nobody asked for it; the exit status."""
    wanted, there = expected(), found(directory)
    for row in sorted(wanted - there):
        print(f"{directory}: missing: {row}", file=sys.stderr)
    for row in sorted(there - wanted):
        print(f"{directory}: not in bench/evaluation/smoke.py: {row}", file=sys.stderr)
    print(f"{len(wanted & there)} of {len(wanted)} rows are there")
    return int(wanted != there)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
