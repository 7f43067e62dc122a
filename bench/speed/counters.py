"""Nsight Compute's counters of decode, step and scan, beside what the PTX emulator counts: do they agree?

A part of ``python -m bench.gpu``. The device's own counters need ``ncu`` and the driver's permission; without either
a row says so. ``python -m bench.speed.counters CASE ...`` is what ncu watches: each case launched once after a warm-up.

Executed instructions are of warps. ncu's are of the machine code (SASS), the emulator's of PTX, so their ratio is what
the last compiler makes of it; sectors (32 bytes) that loads and stores ask L1 for should be the same.
"""

from __future__ import annotations

import contextlib
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..instrument import results
from ..instrument.rows import Row, absent, counted
from . import budget, problems, suite
from .problems import Case

CASES = (
    *(Case("decode_", batch=rows) for rows in (1, 4)),
    *(Case("step", batch=rows) for rows in (1, 32)),
    *(Case("scan", length) for length in (64, 8192)),
)
METRICS = {
    "smsp__inst_executed.sum": "instructions",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "load_sectors",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum": "store_sectors",
    "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum": "load_requests",
    "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum": "store_requests",
    "dram__bytes_read.sum": "dram_read",
    "dram__bytes_write.sum": "dram_written",
}
SECONDS = 75  # of ncu; the part's own limit is later
EMULATED = "executed"  # rows named executed/KERNEL hold the emulator's figures; their parameters are the sizes
CHOSEN = ("parts", "chunk", "spacing")  # parameters of rows of which a launcher did not choose by itself
SAME = ("instructions", "load_sectors", "store_sectors")  # what both count
UNITS = {"": 1, "inst": 1, "sector": 1, "request": 1, "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def case_of(text: str) -> Case:
    """A case on a command line, as in ``scan:8192:1``.

    Raises:
        ValueError: something else.
    """
    parts = text.split(":")
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        raise ValueError(f"case: got {text!r}, allowed KERNEL:TOKENS:BATCH")
    return Case(parts[0], int(parts[1]), int(parts[2]))


def command(ncu: str, cases: Sequence[Case]) -> list[str]:
    """What counts the cases' launches: those between the profiler's start and stop."""
    return [
        ncu, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only",
        "--csv", "--print-units", "base", "--metrics", ",".join(METRICS),
        sys.executable, "-m", "bench.speed.counters", *(f"{case.kernel}:{case.tokens}:{case.batch}" for case in cases),
    ]  # fmt: skip


def assign(launches: list[dict], cases: Sequence[Case]) -> list[tuple[Case, dict]]:
    """Which case each launch is of: they come in the cases' order, as the launchers say; others' kernels go."""
    expected = [(case, name) for case in cases for name, *_ in budget.launched(case)]
    ours = [launch for launch in launches if launch["kernel"] in {name for _, name in expected}]
    return [(case, launch) for (case, name), launch in zip(expected, ours) if launch["kernel"] == name]


def parse(text: str) -> list[dict]:
    """The launches in the output of ``ncu --csv``, in their order: ``kernel`` and the values of METRICS.

    ncu writes a line a metric under a heading, between lines of its own and of the program that begin otherwise.
    """
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    launches: dict[str, dict] = {}
    for line in csv.DictReader(line for line in lines[first:] if line.startswith('"')):
        metric = METRICS.get(line.get("Metric Name") or "")
        number, unit = line.get("Metric Value") or "", line.get("Metric Unit") or ""
        launch = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"].split("(")[0]})
        try:
            value = float(number.replace(",", "")) * UNITS[unit]
        except (ValueError, KeyError):
            continue  # "n/a", or a unit that these metrics do not have
        if metric:
            launch[metric] = value
    return list(launches.values())


def why_not(text: str, status: int | None) -> str:
    """What kept ncu from counting, from its output and exit status (None: it took too long)."""
    if "ERR_NVGPUCTRPERM" in text:
        return "the driver allows performance counters to its administrator alone (ERR_NVGPUCTRPERM)"
    if status is None:
        return f"ncu took more than {SECONDS} s"
    errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    if errors:
        return "ncu: " + errors[0].removeprefix("==ERROR==").strip()[:200]
    return f"ncu ended with {status} and no counters: {suite.last_line(text)}"


def emulated(directory: Path = results.DIRECTORY) -> list[dict]:
    """Rows that the emulator's report left: ``kernel``, parameters and values in one, of the newest file that has any.

    Whatever cannot be read holds none.
    """
    found: dict[str, list[dict]] = {}
    for path in sorted(directory.rglob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            result = results.load(path)
            rows = [row for row in result.rows if row.kind == EMULATED and row.status == "measured"]
            if rows:
                found[str(result.head["time"])] = [
                    {"kernel": row.variant} | row.parameters | row.values for row in rows
                ]
    return found[max(found)] if found else []


def beside(kernel: str, case: Case, figures: list[dict]) -> dict[str, float]:
    """The emulator's figures of one launch by this module's names, from the row of the same kernel and sizes; or {}."""
    sizes = case.parameters | {"target": "sm_90"}
    for row in figures:
        same = row["kernel"].removesuffix("_kernel").strip("_") == kernel.removesuffix("_kernel")
        same = same and not any(row.get(key) for key in CHOSEN)
        if same and all(row.get(key, value) == value for key, value in sizes.items()):
            return {name: float(row[name]) for name in SAME if name in row}
    return {}


def row_of(launch: dict, case: Case, figures: list[dict]) -> Row:
    """One launch: ncu's counts, the emulator's as ``emulated_…``, and ``…_to_emulated``, the first ÷ the second."""
    values = {key: value for key, value in launch.items() if key != "kernel"}
    there = beside(launch["kernel"], case, figures)
    for key, value in there.items():
        values[f"emulated_{key}"] = value
        if key in launch and value:
            values[f"{key}_to_emulated"] = launch[key] / value
    note = "" if there else "no emulator's figures of this launch under bench/results"
    return counted(f"counters/{launch['kernel']}", case.parameters, note, **values)


def rows(plan) -> Iterator[Row]:
    """A row for each launch of each case, or one that says why there are no counters."""
    ncu = shutil.which("ncu")
    if plan.dry or ncu is None:
        yield absent("counters", "a dry run has no counters" if plan.dry else "ncu (Nsight Compute) is not installed")
        return
    try:
        text, status = suite.output_of(command(ncu, CASES), SECONDS, stderr=subprocess.STDOUT)
    except OSError as error:
        text, status = f"==ERROR== {error}", 127
    found = assign(parse(text), CASES)
    figures = emulated()
    for case, launch in found:
        yield row_of(launch, case, figures)
    for case in CASES:
        if case not in [one for one, _ in found]:
            yield absent("counters", why_not(text, status), case.parameters)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Launch each case named twice, the second time between the profiler's start and stop; exit status 2 for others."""
    try:
        cases = [case_of(text) for text in (sys.argv[1:] if arguments is None else arguments)]
    except ValueError as error:
        print(f"bench.speed.counters: error: {error}", file=sys.stderr)
        return 2
    for case in cases:
        torch.manual_seed(0)
        (call,) = problems.calls(case, "cuda", 1)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
