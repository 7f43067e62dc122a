"""python -m bench.memory bank runs small, and says no where something is wrong or misses its target."""

import contextlib
import importlib
import io
import json
import math
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("bank_bench")  # what its tests share is made once

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.memory.bank")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Output, JSON and folder of a run with few users."""
    directory = tmp_path_factory.mktemp("bench")
    arguments = ["--users", "600", "--ids", "40", "--output", directory / "out", "--directory", directory / "bank"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.syspath_prepend(str(ROOT))
        assert importlib.import_module("bench.memory.__main__").main(["bank", *map(str, arguments)]) == 0
    (path,) = (directory / "out").iterdir()
    return printed.getvalue(), json.loads(path.read_text(encoding="utf-8")), directory


def test_rows(small):
    _, result, directory = small
    assert result["arguments"] == {"quick": True, "users": 600, "ids": 40}
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {
        "bank/size", "bank/commit-new", "bank/gather", "bank/list-newest", "bank/list-prefix", "bank/count",
        "bank/list-all", "bank/commit",
    }  # fmt: skip
    assert 9360 < rows["bank/size"]["values"]["bytes_per_user"] < 11_000
    for row in result["rows"]:
        assert row["status"] == "measured"
        if row["p50"] is not None:
            assert 0 < row["p20"] <= row["p50"] <= row["p80"] < math.inf
    assert list((directory / "bank").iterdir()) == [], "the store was left behind"
    assert str(ROOT) not in json.dumps(result) and str(directory) not in json.dumps(result)


def test_targets_are_printed(small):
    output = small[0]
    assert "a million under 12 GB: yes" in output and "gather of 40 random ids" in output
    assert "under 10 ms:" in output and "filling:" in output


def test_a_wrong_store_is_refused(bench, monkeypatch, tmp_path):
    model = bench.backbone()
    fill = bench.fill

    def lossy(bank, model, users):
        seconds = fill(bank, model, users)
        memory = bank.gather([bench.name_of(3)])
        memory[35].add_(1e-7)
        bank.commit([bench.name_of(3)], memory)
        return seconds

    monkeypatch.setattr(bench, "fill", lossy)
    (row,) = bench.measure(tmp_path / "users.bank", model, 50, 10)
    assert row.status == "refused" and "not those that were committed" in row.note
    assert bench.verdicts([row], 50, 10) == [f"refused: {row.note}"]


def test_a_missed_target_is_said(bench):
    size = bench.counted("bank/size", {}, bytes=13e9, bytes_per_user=13_000)
    new = bench.measured("bank/commit-new", {}, [1.0, 1.0])
    new.values["users_per_second"] = 5.0
    gather = bench.measured("bank/gather", {}, [0.011, 0.012])
    said = "\n".join(bench.verdicts([size, new, gather], 1_000_000, 512))
    assert "a million under 12 GB: NO" in said and "under 10 ms: NO" in said
