"""Benchmarks of this machine: JSON, and a table last. Without a GPU what a CPU can show, with one the full sweep.

python -m bench [--quick] [--only scan|gradient|model|costs] [--threads N] [--output DIR] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import gpu
from .instrument import commands, machine, results
from .speed import costs, model, scan

PARTS = {"scan": scan.run, "gradient": scan.run_gradients, "model": model.run, "costs": costs.run}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of deltamem-fast.")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; no targets")
    parser.add_argument("--only", choices=list(PARTS), help="one benchmark of a CPU instead of all")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on a CPU (default: PyTorch's own)")
    parser.add_argument("--output", type=Path, default=results.DIRECTORY, help="folder of the JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch sees a GPU")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error("--threads: allowed 1 or more")
    if options.device is None:
        cpu_only = options.quick or options.only or options.threads
        options.device = "cuda" if torch.cuda.is_available() and not cpu_only else "cpu"
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; the exit status is 1 if something was refused."""
    options = parse(arguments)
    if options.device == "cuda":
        return gpu.main(["--full", "--output", str(options.output)])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.quick:  # a process that measures nothing goes on as it was
        machine.keep_memory()
    progress = commands.progress()
    torch.manual_seed(0)
    rows = [row for name, run in PARTS.items() if options.only in (None, name) for row in run(options.quick, progress)]
    arguments = {key: getattr(options, key) for key in ("quick", "only", "threads")}
    return commands.finish(rows, arguments, options.output)


if __name__ == "__main__":
    sys.exit(main())
