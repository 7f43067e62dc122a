"""The CPU benchmarks run, write what they promise, and refuse to time what is wrong."""

import importlib
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import ScanOutput

pytestmark = pytest.mark.xdist_group("bench")  # one worker runs the quick benchmarks, once
ROOT = Path(__file__).resolve().parents[2]
TOP = {
    "format_version", "device", "driver", "processor", "cores", "threads", "freed_memory", "python", "torch",
    "transformers", "numba", "triton", "commit", "dirty", "time", "arguments", "rows",
}  # fmt: skip
ROW = {"name", "parameters", "status", "note", "error", "samples", "p20", "p50", "p80", "ratios", "values"}


def bench(name):
    return importlib.import_module(f"bench.{name}")


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
    assert result["arguments"] == {"quick": True, "only": None, "threads": 1}
    assert result["threads"] == 1 and result["cores"] >= 1 and result["driver"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result["time"])
    assert result["torch"] == torch.__version__
    assert all(set(row) == ROW for row in result["rows"])
    assert re.fullmatch(r"cpu-[a-z0-9-]+-torch[\d.a-z]+-(triton[\d.a-z]+-)?\w+(-changed)?-threads1-quick\.json",
                        quick[1].name)  # fmt: skip
    assert not bench("instrument.results").load(quick[1]).whole


def test_rows(quick):
    rows = json.loads(quick[1].read_text(encoding="utf-8"))["rows"]
    names = [row["name"] for row in rows]
    for name in ("prefill/unpatched", "prefill/patched", "decode/unpatched", "decode/patched"):
        assert names.count(name) == 4
    assert names.count("scan/reference") == names.count("scan/numba") == 2
    assert names.count("scan-gradient/per-token") == names.count("scan-gradient/numba") == 2
    assert names.count("training-step/reference") == names.count("training-step/numba") == 1
    assert {"scan/released", "scan/fla", "operations/unpatched", "operations/patched", "compiled"} <= set(names)
    for row in rows:
        if row["status"] == "absent":
            assert row["p50"] is None and not row["ratios"] and not row["values"] and row["note"]
            continue
        assert row["status"] == "measured", row
        if row["p50"] is None:
            assert row["values"], row
            continue
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] < math.inf
        assert row["samples"] >= 3
        for low, middle, high in row["ratios"].values():
            assert 0 < low <= middle <= high < math.inf
        if row["name"] in ("scan/numba", "prefill/patched", "decode/patched"):
            assert {"reference", "unpatched"} & set(row["ratios"])
            assert 0 <= row["error"] < 1e-4


def test_nothing_private_in_the_json(quick):
    text = quick[1].read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) not in text and str(quick[1].parent) not in text


def test_table_is_printed(quick):
    lines = quick[0].splitlines()
    rows = json.loads(quick[1].read_text(encoding="utf-8"))["rows"]
    start = next(i for i, line in enumerate(lines) if line.startswith("benchmark"))
    assert [line.split()[0] for line in lines[start + 2 :]] == [row["name"] for row in rows]


def test_a_wrong_gradient_is_refused(monkeypatch):
    scan = bench("speed.scan")

    def wrong(*arguments):
        reads, state = scan.per_token(*arguments)
        return reads * 1.001, state

    monkeypatch.setattr(scan, "gradient_implementations", lambda: {"per-token": scan.per_token, "numba": wrong})
    case = scan.on_cpu("scan_gradient", 16)
    rows = {row.name: row for row in scan.gradient_rows(case, turns=2, calls=2, memory=False)}
    row = rows["scan-gradient/numba"]
    assert row.status == "refused" and "relative error" in row.note and row.p50 is None and not row.ratios
    assert rows["scan-gradient/per-token"].status == "measured"


def wrong_reads(*args, **kwargs):
    out = reference.scan(*args, **kwargs)
    return ScanOutput(out.reads * 1.001, out.state, out.skipped, out.checkpoints)


def wrong_state(*args, **kwargs):
    out = reference.scan(*args, **kwargs)
    return ScanOutput(out.reads, out.state.roll(1, -1), out.skipped, out.checkpoints)


def not_a_number(*args, **kwargs):
    out = reference.scan(*args, **kwargs)
    return ScanOutput(torch.full_like(out.reads, torch.nan), out.state, out.skipped, out.checkpoints)


def compared(scan):
    rows = scan.compared(scan.on_cpu("scan", 16), scan.implementations(), "reference", turns=2, calls=2)
    return {row.name: row for row in rows.values()}


@pytest.mark.parametrize("broken", [wrong_reads, wrong_state, not_a_number])
def test_a_wrong_scan_is_refused(monkeypatch, broken):
    scan = bench("speed.scan")
    monkeypatch.setattr(scan, "implementations", lambda: {"reference": reference.scan, "numba": broken})
    rows = compared(scan)
    row = rows["scan/numba"]
    assert row.status == "refused" and "relative error" in row.note
    assert row.p50 is None and not row.ratios
    json.dumps(row.to_dict(), allow_nan=False)
    assert rows["scan/reference"].status == "measured"
    assert "refused" in bench("instrument.tables").plain_table([row])


def test_a_wrong_baseline_gives_no_ratio(monkeypatch):
    scan = bench("speed.scan")

    def broken(*args, dtype=torch.float32, **kwargs):
        return (reference.scan if dtype == torch.float64 else wrong_reads)(*args, dtype=dtype, **kwargs)

    monkeypatch.setattr(scan, "implementations", lambda: {"reference": broken, "numba": reference.scan})
    rows = compared(scan)
    assert rows["scan/reference"].status == "refused"
    assert rows["scan/numba"].status == "measured" and not rows["scan/numba"].ratios


def test_a_wrong_patch_is_refused(monkeypatch):
    model = bench("speed.model")
    original = model.patch_model

    def patch_badly(backbone, config, backend="auto"):
        patched = original(backbone, config, backend=backend)
        if backend == "auto":
            with torch.no_grad():
                patched.lm_head.weight.mul_(1.001)
        return patched

    monkeypatch.setattr(model, "patch_model", patch_badly)
    monkeypatch.setattr(model.peers, "released", lambda: None)
    rows = model.run(True, lambda text: None)
    assert [row.status for row in rows] == ["measured", "refused", "absent"] * 8
    assert all("disabled" in row.note for row in rows if row.status == "refused")


def test_a_backbone_that_the_released_package_does_not_know(monkeypatch):
    model = bench("speed.model")

    def attach(*_):
        raise RuntimeError("No target modules were replaced")

    package = types.SimpleNamespace(HFDeltaMemConfig=dict, attach_delta_mem=attach)
    monkeypatch.setattr(model.peers, "released", lambda: package)
    models = model.make("SmolLM2-135M", "cpu", tiny=True)
    assert list(models.variants) == ["unpatched", "patched"]
    theirs, ours = ({name: p.data_ptr() for name, p in m.named_parameters()} for m in models.variants.values())
    shared = {name for name in theirs if theirs[name] == ours[name]}
    assert shared == {name for name in theirs if ".self_attn." not in name}
    missing = models.refusals["released"]
    assert missing.status == "absent" and "LlamaForCausalLM" in missing.note


def test_a_wrong_adapter_is_refused(monkeypatch):
    """An error in the memory alone shows in the logits: the benchmark's adapter is loud."""
    model = bench("speed.model")
    original = model.patch_model

    def patch_badly(backbone, config, backend="auto"):
        patched = original(backbone, config, backend=backend)
        if backend == "auto":
            for module in patched.modules():
                if hasattr(module, "delta_memory"):
                    module.delta_memory.rule = type(module.delta_memory.rule)(8, mode="no_lambda")
        return patched

    monkeypatch.setattr(model, "patch_model", patch_badly)
    models = model.make("Qwen3-48M", "cpu", tiny=True, peer=False)
    assert list(models.variants) == ["unpatched"] and "relative error" in models.refusals["patched"].note


def test_the_full_model_has_about_50_million_parameters():
    backbones = bench("instrument.backbones")
    model = backbones.build(backbones.configuration("Qwen3-48M"), torch.float32, "meta")
    assert 45e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 55e6


@pytest.mark.parametrize(
    "name, billions", [("Qwen3-4B", 4.02), ("Qwen3-8B", 8.19), ("SmolLM3-3B", 3.08), ("SmolLM2-135M", 0.1345)]
)
def test_backbones_have_the_sizes_of_the_real_ones(name, billions):
    backbones = bench("instrument.backbones")
    model = backbones.build(backbones.configuration(name), torch.bfloat16, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.parametrize(
    "text, name",
    [
        ("Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "intel-xeon-gold-6338"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654-96-core"),
        ("", "unknown"),
    ],
)
def test_slug(text, name):
    assert bench("instrument.machine").slug(text) == name


def test_commit_is_none_outside_git(monkeypatch, tmp_path):
    machine = bench("instrument.machine")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == {"commit": None, "dirty": None}
