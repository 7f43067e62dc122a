"""bench.executed: estimates, rows, and what counts as a difference. The figures themselves: tests/ptx."""

import json
from dataclasses import dataclass, replace

import pytest

from bench import compare, executed
from bench.instrument import devices, machine, results, tables


@dataclass(frozen=True)
class Figures:
    """What bench.executed reads of a launch."""

    kernel: str = "one_kernel"
    programs: int = 1
    warps: int = 1
    instructions: int = 1000
    longest: int = 1000
    loads: int = 200
    stores: int = 100
    asked: int = 300
    there: int = 100
    past_l1: int = 150


@dataclass(frozen=True)
class Case:
    name: str = "step"
    floor: int = 3200
    tokens: int = 1

    @property
    def parameters(self):
        return {"tokens": self.tokens, "batch": 1}


def test_an_estimate_is_the_slowest_of_three():
    device = devices.Known("one", copy=1e12, flops=1e15, processors=100, clock=1e9)
    assert executed.seconds([Figures()], device) == pytest.approx(1e-6)  # one warp, an instruction a cycle
    assert executed.seconds([Figures(there=10**6)], device) == pytest.approx(32e-6)  # memory
    many = Figures(programs=400, warps=4, instructions=10**6, longest=100)
    assert executed.seconds([many], device) == pytest.approx(2.5e-6)  # 400 instructions a cycle
    assert executed.seconds([Figures(), many], device) == pytest.approx(3.5e-6)


def test_rows():
    call, one, two = executed.rows_of(Case(), [Figures(), replace(Figures(), kernel="two_kernel", asked=100)])
    assert call.name == one.name == "executed/step" and "kernel" not in call.parameters
    assert (one.parameters["kernel"], two.parameters["kernel"]) == ("one_kernel", "two_kernel")
    assert call.values["instructions"] == 2000 and call.values["sectors"] == 400
    assert call.values["sectors_to_distinct"] == 2 and call.values["bytes_to_floor"] == 32 * 300 / 3200
    assert call.note == executed.ESTIMATE and "estimated, not measured" in call.note
    assert len(executed.rows_of(Case(), [Figures()])) == 1
    text = executed.table([call, one, two])
    assert "H200, estimated, not measured" in text and "two_kernel" in text
    assert "H100 1.14 µs, estimated, not measured" in tables.cells(call)[-2]


def test_differences():
    rows = executed.rows_of(Case(), [Figures()])
    committed = executed.collect(rows)
    assert executed.differences(committed, rows) == []
    near = executed.rows_of(Case(), [replace(Figures(), instructions=1015)])
    assert executed.differences(committed, near) == []
    dearer = executed.rows_of(Case(), [replace(Figures(), past_l1=160)])
    assert executed.differences(committed, dearer) == [
        f"executed/step {tables.parameters(rows[0])}: sectors past l1 150 → 160"
    ]
    cheaper = executed.rows_of(Case(), [replace(Figures(), instructions=900)])
    assert "instructions 1,000 → 900" in executed.differences(committed, cheaper)[0]
    assert "not committed" in executed.differences(committed, executed.rows_of(Case(tokens=2), [Figures()]))[0]
    assert executed.differences(None, rows) == ["no result of the emulator is committed"]
    committed.head["triton"] = "0.1"
    assert "Triton 0.1" in executed.differences(committed, rows)[0]


def test_results_are_kept_and_compared(tmp_path):
    old = executed.collect(executed.rows_of(Case(), [Figures()]))
    new = executed.collect(executed.rows_of(Case(), [replace(Figures(), instructions=1200)]))
    old.head["commit"], new.head["commit"] = "old", "new"
    new.head["time"] = "9999-01-01T00:00:00Z"
    paths = [results.write(tmp_path, result) for result in (old, new)]
    assert "ptx-emulator-sm-90" in paths[0].name
    assert results.latest(tmp_path).head["commit"] == "new" and results.latest(tmp_path / "none") is None
    text, bad = compare.report(*paths, 1.1)
    assert bad and "instructions: 1,000 → 1,200, 1.20× (worse" in text
    assert json.loads(paths[0].read_text())["triton"] == machine.version("triton")
