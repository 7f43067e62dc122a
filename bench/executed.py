"""What the kernels execute and ask of memory, counted on the PTX emulator: no GPU, no clock, the same every time.

python -m bench.executed [--output bench/results/emulated]     writes a result; without --output only a table
python -m bench.executed --check                               exit 1 if the newest result is not what the code does

A row ``executed/…`` is a call of a launcher, or (with ``kernel``) one of its launches, as compiled for sm_90.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .instrument import machine, results
from .instrument.devices import KNOWN, Known
from .instrument.results import Result
from .instrument.rows import Row, counted
from .instrument.tables import duration, markdown, number, parameters

DIRECTORY = results.DIRECTORY / "emulated"
TARGET = 90
TOLERANCE = 0.02  # of a committed figure, by which the code's may differ
COUNTED = ("instructions", "sectors", "distinct_sectors", "sectors_past_l1")
SECTOR = 32


ESTIMATE = "the times are estimated, not measured"


def seconds(figures: Iterable, device: Known) -> float:
    """The roofline of launches one after another: memory, instructions issued, or the longest warp of each.

    A multiprocessor issues four instructions a cycle, one of a warp. Latencies and the launch itself come on top: a
    bound from below.
    """
    total = 0.0
    for f in figures:
        busy = min(f.programs, device.processors) * min(4, f.warps * -(-f.programs // device.processors))
        cycles = max(f.longest, f.instructions / busy)
        total += max(SECTOR * f.there / device.copy, cycles / device.clock)
    return total


def _counts(figures: list) -> dict[str, float]:
    asked, there, past = (sum(getattr(f, name) for f in figures) for name in ("asked", "there", "past_l1"))
    return {
        "instructions": sum(f.instructions for f in figures), "sectors": asked, "distinct_sectors": there,
        "load_sectors": sum(f.loads for f in figures), "store_sectors": sum(f.stores for f in figures),
        "sectors_past_l1": past, "sectors_to_distinct": asked / there,
    }  # fmt: skip


def rows_of(case, figures: list) -> list[Row]:
    """A row of the call, and of each launch if there are several."""
    name, sizes = f"executed/{case.name}", case.parameters | {"target": f"sm_{TARGET}"}
    counts = _counts(figures)
    counts["bytes_to_floor"] = SECTOR * counts["sectors_past_l1"] / case.floor
    counts |= {f"estimate_{device.name}": seconds(figures, device) for device in KNOWN}
    found = [counted(name, sizes, ESTIMATE, **counts)]
    if len(figures) > 1:
        found += [counted(name, sizes | {"kernel": f.kernel}, **_counts([f])) for f in figures]
    return found


def run(progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """All rows; to be called in a process of its own, before anything imports Triton.

    Raises:
        ValueError: a call's results are wrong.
    """
    sys.path.insert(0, str(machine.ROOT / "tests" / "ptx"))
    import project

    emulator = project.emulator(TARGET, seed=1, races=False)
    import traffic
    from cases import CASES

    found = []
    for case in CASES:
        progress(str(case))
        found += rows_of(case, traffic.measure(case, emulator))
    return found


def collect(rows: list[Row]) -> Result:
    """A result whose device is the emulator."""
    return results.collect(rows, "cpu", {}, device=f"PTX emulator, sm_{TARGET}")


def differences(committed: Result | None, rows: list[Row]) -> list[str]:
    """Figures of ``rows`` that are not those of a committed result, in words. Of another Triton's they may differ."""
    if committed is None:
        return ["no result of the emulator is committed"]
    triton = machine.version("triton")
    if committed.head["triton"] != triton:
        return [f"the committed result is of Triton {committed.head['triton']}, this is {triton}"]
    old, found = {row.key: row for row in committed.rows}, []
    for row in rows:
        if row.key not in old:
            found.append(f"{row.name} {parameters(row)}: not committed")
            continue
        for name in COUNTED:
            before, after = old[row.key].values[name], row.values[name]
            if abs(after - before) > TOLERANCE * before:
                found.append(f"{row.name} {parameters(row)}: {name.replace('_', ' ')} {before:,.0f} → {after:,.0f}")
    return found


def table(rows: Iterable[Row]) -> str:
    """Columns for people; Markdown."""
    heading = ["call or kernel", "sizes", "instructions", "sectors ÷ distinct", "past L1 ÷ distinct", "bytes ÷ floor"]
    lines = [heading + [f"{device.name}, {ESTIMATE.split(' are ')[1]}" for device in KNOWN]]
    for row in rows:
        v, sizes = row.values, " ".join(f"{k}={x}" for k, x in row.parameters.items() if k != "target")
        name, sizes = (row.parameters["kernel"], "") if "kernel" in row.parameters else (row.variant, sizes)
        past = number(v["sectors_past_l1"] / v["distinct_sectors"])
        cells = [name, sizes, f"{v['instructions']:,.0f}", number(v["sectors_to_distinct"]), past]
        cells += [number(v["bytes_to_floor"]) if "bytes_to_floor" in v else ""]
        lines.append(cells + [duration(v.get(f"estimate_{device.name}")) for device in KNOWN])
    return markdown(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print, write or check; the exit status is 1 if ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(prog="python -m bench.executed", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for the JSON")
    parser.add_argument("--check", action="store_true", help="compare with the newest committed result")
    options = parser.parse_args(arguments)
    rows = run(lambda text: print(text, file=sys.stderr, flush=True))
    print(table(rows))
    if options.output:
        print(results.write(options.output, collect(rows)))
    wrong = differences(results.latest(DIRECTORY), rows) if options.check else []
    if wrong:
        print("\n".join([*wrong, "intended? make kernels-report, and commit what it writes"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
