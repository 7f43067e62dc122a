"""The benchmarks run, write what they promise, and refuse to time what is wrong."""

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltamem_fast import reference
from deltamem_kernels.rule import ScanOutput

ROOT = Path(__file__).resolve().parent.parent
TOP = {
    "format_version", "device", "cores", "threads", "python", "torch", "transformers", "numba", "triton", "commit",
    "dirty", "date", "arguments", "rows",
}  # fmt: skip
ROW = {
    "name", "parameters", "status", "note", "error", "samples", "p20", "p50", "p80", "ratio", "ratio_p20", "ratio_p80",
    "target", "met",
}  # fmt: skip


def bench(name):
    return importlib.import_module(f"bench.{name}")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def run(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Output and JSON path of one quick run."""
    directory = tmp_path_factory.mktemp("results")
    output = run("bench", "--quick", "--threads", 1, "--output", directory)
    (path,) = directory.iterdir()
    return output, path


def test_schema(quick):
    result = json.loads(quick[1].read_text(encoding="utf-8"))
    assert set(result) == TOP
    assert result["arguments"] == {"quick": True, "only": None, "threads": 1, "dtype": "float32"}
    assert result["threads"] == 1 and result["cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert result["torch"] == torch.__version__
    assert all(set(row) == ROW for row in result["rows"])
    assert re.fullmatch(r"cpu-[a-z0-9-]+-torch[\d.a-z]+-threads1-quick\.json", quick[1].name)


def test_rows(quick):
    rows = json.loads(quick[1].read_text(encoding="utf-8"))["rows"]
    names = [row["name"] for row in rows]
    for name in ("prefill/unpatched", "prefill/patched", "decode/unpatched", "decode/patched"):
        assert names.count(name) == 2
    assert names.count("scan/reference") == names.count("scan/numba") == 2
    assert {"scan/deltamem", "scan/fla"} <= set(names)
    for row in rows:
        if row["status"] == "absent":
            assert row["p50"] is None and row["ratio"] is None and row["note"]
            continue
        assert row["status"] == "measured", row
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] < math.inf
        assert row["samples"] >= 3
        if row["name"] in ("scan/numba", "prefill/patched", "decode/patched"):
            assert 0 < row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] < math.inf
            assert 0 <= row["error"] < 1e-4
        else:
            assert row["ratio"] is None


def test_nothing_private_in_the_json(quick):
    text = quick[1].read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text and str(quick[1].parent) not in text


def test_table_is_printed(quick):
    lines = quick[0].splitlines()
    rows = json.loads(quick[1].read_text(encoding="utf-8"))["rows"]
    start = next(i for i, line in enumerate(lines) if line.startswith("benchmark"))
    assert [line.split()[0] for line in lines[start + 2 :]] == [row["name"] for row in rows]


def test_markdown(quick, capsys):
    bench("table").main([str(quick[1])])
    heading, _, *table = capsys.readouterr().out.strip().splitlines()
    rows = json.loads(quick[1].read_text(encoding="utf-8"))["rows"]
    assert heading.startswith("**") and f"torch {torch.__version__}" in heading
    assert len(table) == len(rows) + 2
    assert len({line.count("|") for line in table}) == 1


def wrong_reads(*args, **kwargs):
    out = reference.scan(*args, **kwargs)
    return ScanOutput(out.reads * 1.001, out.state, out.skipped, out.checkpoints)


def wrong_state(*args, **kwargs):
    out = reference.scan(*args, **kwargs)
    return ScanOutput(out.reads, out.state.roll(1, -1), out.skipped, out.checkpoints)


def not_a_number(*args, **kwargs):
    out = reference.scan(*args, **kwargs)
    return ScanOutput(torch.full_like(out.reads, torch.nan), out.state, out.skipped, out.checkpoints)


@pytest.mark.parametrize("broken", [wrong_reads, wrong_state, not_a_number])
def test_a_wrong_scan_is_refused(monkeypatch, broken):
    scan = bench("scan")
    monkeypatch.setattr(scan, "implementations", lambda: {"reference": reference.scan, "numba": broken})
    rows = {row.name: row for row in scan.measure(scan.Case(16), turns=2, calls=2, target=1.0)}
    row = rows["scan/numba"]
    assert row.status == "refused" and "relative error" in row.note
    assert row.p50 is None and row.ratio is None and row.met is None
    json.dumps(row.to_dict(), allow_nan=False)
    assert rows["scan/reference"].status == "measured"
    assert "refused" in bench("rows").plain_table([row.to_dict()])


def test_a_wrong_baseline_gives_no_ratio(monkeypatch):
    scan = bench("scan")

    def broken(*args, dtype=torch.float32, **kwargs):
        return (reference.scan if dtype == torch.float64 else wrong_reads)(*args, dtype=dtype, **kwargs)

    monkeypatch.setattr(scan, "implementations", lambda: {"reference": broken, "numba": reference.scan})
    rows = {row.name: row for row in scan.measure(scan.Case(16), turns=2, calls=2, target=1.0)}
    assert rows["scan/reference"].status == "refused"
    assert rows["scan/numba"].status == "measured" and rows["scan/numba"].ratio is None


def test_a_wrong_patch_is_refused(monkeypatch):
    model = bench("model")
    original = model.patch_model

    def patch_badly(backbone, config, backend="auto"):
        patched = original(backbone, config, backend=backend)
        if backend == "auto":
            with torch.no_grad():
                patched.lm_head.weight.mul_(1.001)
        return patched

    monkeypatch.setattr(model, "patch_model", patch_badly)
    rows = model.run(True, lambda text: None)
    assert [row.status for row in rows] == ["measured", "refused"] * 4
    assert all("disabled" in row.note for row in rows if row.status == "refused")


def test_targets():
    rows = bench("rows")
    clear = rows.compare(rows.measured("a", {}, [1.0, 1.0]), [1.1, 1.2, 1.3], 1.0)
    assert clear.met is True and clear.note == ""
    row = rows.measured("a", {"tokens": 10, "batch": 2}, [1.0, 2.0, 3.0])
    assert (row.p20, row.p50, row.p80) == pytest.approx((1.4, 2.0, 2.6))
    assert rows.compare(row, [0.9, 1.0, 1.2], 1.0).met is True
    assert rows.compare(row, [0.9, 0.99, 1.2], 1.0).met is False
    assert rows.cells(row.to_dict())[-1] == "no: the spread includes the target"
    assert rows.compare(row, [0.9, 1.0]).met is None
    assert rows.cells(row.to_dict())[2:6] == ["1.4 s", "2 s", "2.6 s", "10"]


def test_the_full_model_has_about_50_million_parameters():
    model = bench("model")
    with torch.device("meta"):
        backbone = model.build(model.FULL, torch.float32)
    assert 45e6 <= sum(parameter.numel() for parameter in backbone.parameters()) <= 55e6


@pytest.mark.parametrize(
    "text, name",
    [
        ("Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "intel-xeon-gold-6338"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654-96-core"),
        ("", "unknown"),
    ],
)
def test_slug(text, name):
    assert bench("machine").slug(text) == name


def test_commit_is_none_outside_git(monkeypatch, tmp_path):
    machine = bench("machine")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == {"commit": None, "dirty": None}
