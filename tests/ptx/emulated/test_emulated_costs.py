"""Every launcher at the released adapter's sizes: right, and as cheap as the committed figures say."""

import pytest
import traffic
from cases import CASES

from bench import executed
from bench.instrument import machine, results

COMMITTED = results.latest(executed.DIRECTORY)
QUICK = [case for case in CASES if case.of.batch != 4]  # whole: python -m bench.executed --check


@pytest.fixture(autouse=True)
def without_races(emulator, monkeypatch):
    # Races at these sizes are for the other tests, which take more schedules of less.
    monkeypatch.setattr(emulator, "races", False)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_costs(emulator, case):
    if emulator.arch != executed.TARGET:
        pytest.skip(f"the committed figures are of sm_{executed.TARGET}")
    rows = executed.rows_of(case, traffic.measure(case, emulator))
    if COMMITTED is not None and COMMITTED.head["triton"] != machine.version("triton"):
        pytest.skip(f"the committed figures are of Triton {COMMITTED.head['triton']}: right, but not compared")
    found = executed.differences(COMMITTED, rows)
    assert not found, "\n".join([*found, "intended? make kernels-report, and commit what it writes"])
