"""What each launch costs, counted on the emulator: executed instructions, and the sectors that it asks for.

    python tests/ptx/traffic.py                       every case
    python tests/ptx/traffic.py step "decode B 1"     cases whose name begins so
    python tests/ptx/traffic.py step --lines 9        and the nine dearest accesses of each launch

A sector is 32 bytes. ``asked`` are the distinct sectors of each warp instruction, added up; ``there`` the distinct
sectors of the launch, one that is loaded and stored twice; ``repeats`` loads of what the same program had loaded
before, which may be found in L1; ``past L1`` the rest of what was asked for. ``÷ floor``: bytes past L1, and bytes
there, of all launches of a call, by the least that the call must move.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import project


@dataclass(frozen=True)
class Figures:
    """Costs of one launch; sectors of 32 bytes.

    Attributes:
        kernel, programs, warps: its name, its grid, warps of a program.
        instructions: executed by all warps.
        longest: executed by the warp that executed most.
        loads, stores: sectors asked for.
        load_repeats, store_repeats: of these, asked for before by the same program.
        loaded, stored: distinct sectors.
        used: bytes that lanes take ÷ bytes asked for; over 1 where lanes share numbers.
    """

    kernel: str
    programs: int
    warps: int
    instructions: int
    longest: int
    loads: int
    stores: int
    load_repeats: int
    store_repeats: int
    loaded: int
    stored: int
    used: float

    @property
    def asked(self) -> int:
        return self.loads + self.stores

    @property
    def there(self) -> int:
        return self.loaded + self.stored

    @property
    def past_l1(self) -> int:
        return self.asked - self.load_repeats

    @property
    def ratio(self) -> float:
        """Sectors asked for ÷ distinct sectors."""
        return self.asked / max(1, self.there)


def figures(record) -> Figures:
    """Of a launch's ``emulator.Record``."""
    c = record.counts
    return Figures(
        record.name, record.grid, record.program.threads // 32, c.instructions, c.longest, c.load_sectors,
        c.store_sectors, c.load_repeats, c.store_repeats, len(c.loaded), len(c.stored),
        (c.load_bytes + c.store_bytes) / max(1, c.asked * 32),
    )  # fmt: skip


def measure(case, emulator) -> list[Figures]:
    """Run one of ``cases.CASES`` on ``emulator``: the figures of its launches; the emulator's records hold them too.

    Raises:
        ValueError: the results are wrong, so that what they cost says nothing.
    """
    inputs = case.inputs()
    exact = case.exact(inputs)
    emulator.records.clear()
    if wrong := case.wrong(case.call(inputs)(), exact):
        raise ValueError(wrong)
    return [figures(record) for record in emulator.records]


def _print(case, emulator, lines: int) -> None:
    found = measure(case, emulator)
    past, there = (32 * sum(getattr(f, name) for f in found) for name in ("past_l1", "there"))
    print(
        f"{case}: {sum(f.instructions for f in found)} instructions; bytes ÷ floor: {past / case.floor:.2f} past L1, "
        f"{there / case.floor:.2f} there (floor {case.floor} B)"
    )
    for record, f in zip(emulator.records, found, strict=True):
        print(
            f"  {f.kernel:<22} {f.programs:>4} × {f.warps} warps {f.instructions:>8} instr (warp {f.longest:>6}) "
            f"| load {f.loads:>6}/{f.loaded:>6} = {f.loads / max(1, f.loaded):5.2f}"
            f" ({(f.loads - f.load_repeats) / max(1, f.loaded):5.2f} past L1)"
            f" | store {f.stores:>5}/{f.stored:>5} = {f.stores / max(1, f.stored):5.2f}"
            f" | asked ÷ there {f.ratio:5.2f} ({f.past_l1 / max(1, f.there):5.2f} past L1), used {f.used:4.2f}"
        )
        source = record.program.by_line
        dearest = sorted(record.counts.lines.items(), key=lambda item: -item[1].sectors)[:lines]
        for number, line in dearest:
            n = line.executions
            print(
                f"      {source[number].op:<28}{source[number].source:<28} × {n:>5}: {line.sectors / n:5.1f} sectors, "
                f"{line.lanes / n:4.1f} lanes, {line.bytes / n:6.1f} B"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of names; none: all")
    parser.add_argument("--lines", type=int, default=3, help="dearest accesses of each launch to print (3)")
    parser.add_argument("--arch", type=int, default=90, help="80 or 90 (90)")
    parser.add_argument("--fusion", choices=("asked", "off", "on"), default="asked", help="FP fusion of all kernels")
    given = parser.parse_args()
    fusion = {"asked": None, "off": False, "on": True}[given.fusion]
    emulator = project.emulator(given.arch, fusion=fusion, seed=1, races=False)
    from cases import CASES

    for case in CASES:
        if not given.cases or str(case).startswith(tuple(given.cases)):
            _print(case, emulator, given.lines)


if __name__ == "__main__":
    main()
