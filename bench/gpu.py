"""On a machine with a GPU: its tests, then kernel and model timings; JSON under --output, a table last.

python -m bench.gpu [--output DIR] [--seconds N] [--full] [--only PART ...] [--skip-tests] [--plan]     (make gpu)

Each part runs in a process of its own with a time limit, so that one that fails or hangs costs no other; rows are
kept as they come, and the result is written after each part. A part that there is no time left for is named and left
out. ``--plan`` prints how long each should take; ``--dry-run`` runs the same parts with tiny sizes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .instrument import commands, machine, results
from .instrument.rows import Row, absent, from_dict, refused
from .instrument.tables import aligned, plain_table
from .speed import budget, suite
from .speed.parts import PARTS, Plan

ROOT = machine.ROOT
SECONDS = 520  # of nine minutes; what is left is for starting, writing and the table
LEAST = 25  # seconds under which no further part is begun


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="GPU tests and timings.")
    parser.add_argument("--output", type=Path, default=results.DIRECTORY, help="folder of the JSON")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    parser.add_argument("--full", action="store_true", help="the full sweep, without a time limit (make bench)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--skip-tests", action="store_true", help="timings alone")
    parser.add_argument("--plan", action="store_true", help="print what each part does and how long it should take")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, to see that every part runs")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # what a part's own process does
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def limit_of(name: str) -> float:
    """Seconds that a part may take."""
    return PARTS[name].estimate(Plan("cuda")).limit


def plan_table(seconds: float) -> str:
    """Part by part, from what it launches and compiles, how long it should take and how long it gets at most."""
    plan = Plan("cuda")
    estimates = {"tests": budget.of_tests()} | {name: part.estimate(plan) for name, part in PARTS.items()}
    lines, total = [["part", "kernels compiled", "our launches", "s", "at most", "begins at"]], 0.0
    for name, found in estimates.items():
        limit = min(found.limit, seconds - total)
        begins = f"{total:.0f}" if limit >= LEAST else "left out"
        counts = [f"{found.compiled}", f"{found.launches:,}" if found.launches else ""]
        lines.append([name, *counts, f"{found.seconds:.0f}", f"{max(0, limit):.0f}", begins])
        total = min(seconds, total + found.seconds) if limit >= LEAST else total
    return aligned(lines) + f"\nin all {total:.0f} of {seconds:.0f} s; assumptions in bench/speed/budget.py"


def run_part(options: argparse.Namespace) -> int:
    """What a part's own process does: each row is a line of ``--rows`` as soon as it is there."""
    progress = commands.progress()
    torch.manual_seed(0)
    device = "cpu" if options.dry_run else "cuda"
    plan = Plan(device, options.dry_run, options.full, lambda text: progress(f"  {options.part}: {text}"))
    with options.rows.open("a", encoding="utf-8") as file:
        for row in PARTS[options.part].run(plan):
            file.write(json.dumps(row.to_dict(), allow_nan=False) + "\n")
            file.flush()
    return 0


def part_rows(name: str, options: argparse.Namespace, seconds: float | None) -> Iterator[Row]:
    """Run a part in a process of its own; its rows, and one that says how it ended if not well."""
    command = [sys.executable, "-m", "bench.gpu", "--part", name]
    command += ["--dry-run"] * options.dry_run + ["--full"] * options.full
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")] + sys.path)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        text, status = suite.output_of([*command, "--rows", str(path)], seconds, "stderr", env=environment)
        sys.stderr.write(text[-4000:])
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                yield from_dict(json.loads(line))
        if status is None:
            yield absent(name, f"cut off after {seconds:.0f} s; what is missing was left out")
        elif status and "OutOfMemoryError" in text:
            yield absent(name, "does not fit the device: out of memory; what is missing was left out")
        elif status:
            yield refused(name, {}, f"failed with status {status}: {suite.last_line(text)}")


def measure(options: argparse.Namespace, start: float) -> Iterator[list[Row]]:
    """The rows of one part after another, parts that are left out among them."""

    def left() -> float:
        return options.seconds - (time.perf_counter() - start)

    say = commands.progress()
    unlimited = options.full or options.dry_run
    if not (options.skip_tests or options.dry_run or options.only):
        say("tests")
        yield [suite.run(options.output, 3600 if unlimited else budget.of_tests().limit, unlimited)]
    for name in options.only or PARTS:
        limit = None if unlimited else min(limit_of(name), left())
        if limit is not None and limit < LEAST:
            say(f"{name}: left out, no time")
            yield [absent(name, "left out: no time")]
            continue
        say(name if limit is None else f"{name}, at most {limit:.0f} s")
        yield list(part_rows(name, options, limit))


def main(arguments: list[str] | None = None) -> int:
    """Run everything; the exit status is 1 if the tests or a check failed, 2 if there is no GPU."""
    options = parse(arguments)
    if options.plan:
        print(plan_table(options.seconds))
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("bench.gpu: error: PyTorch sees no CUDA device here; make test runs without one", file=sys.stderr)
        return 2
    if options.part:
        return run_part(options)
    start = time.perf_counter()
    said = {key: getattr(options, key) for key in ("full", "only", "skip_tests", "dry_run")}
    rows: list[Row] = []
    path = None
    for more in measure(options, start):
        rows += more
        # Written after each part: a run that is cut short has left what it measured.
        path = results.write(options.output, results.collect(rows, "cpu" if options.dry_run else "cuda", said))
    print(plain_table(rows))
    print(f"{path}  ({time.perf_counter() - start:.0f} s)")
    return 1 if any(row.status == "refused" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
