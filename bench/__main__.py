"""Run the CPU benchmarks, write JSON, and print a table last.

python -m bench [--quick] [--only scan|model] [--threads N] [--output DIR]
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import torch

from deltamem_fast.files import write_json

from . import machine, model, scan
from .rows import plain_table

FORMAT_VERSION = 1
RESULTS = Path(__file__).resolve().parent / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="CPU benchmarks of deltamem-fast.")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; no targets")
    parser.add_argument("--only", choices=("scan", "model"), help="one benchmark instead of all")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON (default: bench/results)")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error("--threads: allowed 1 or more")
    return options


def file_name(options: argparse.Namespace) -> str:
    """A name that tells devices and torch versions apart, and partial results from whole ones."""
    parts = ["cpu", machine.slug(machine.processor()), f"torch{torch.__version__.split('+')[0]}"]
    if options.threads is not None:
        parts.append(f"threads{options.threads}")
    if options.dtype != "float32":
        parts.append(options.dtype)
    parts += [options.only] if options.only else []
    parts += ["quick"] if options.quick else []
    return "-".join(parts) + ".json"


def measure(options: argparse.Namespace, progress) -> dict[str, Any]:
    """The result as a JSON object."""
    described = machine.describe()
    rows = []
    if options.only in (None, "scan"):
        rows += scan.run(options.quick, progress)
    if options.only in (None, "model"):
        rows += model.run(options.quick, progress, options.dtype)
    return {
        "format_version": FORMAT_VERSION,
        **described,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "arguments": {key: getattr(options, key) for key in ("quick", "only", "threads", "dtype")},
        "rows": [row.to_dict() for row in rows],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, print."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    torch.manual_seed(0)
    result = measure(options, progress)
    path = write_json(options.output / file_name(options), result)
    print(f"{result['device']}, {result['cores']} cores, {result['threads']} threads, torch {result['torch']}")
    print(f"written to {path}\n")
    print(plain_table(result["rows"]))


if __name__ == "__main__":
    main()
