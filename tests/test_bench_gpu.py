"""The run on a GPU, dry: the same parts with tiny sizes on a CPU, and what happens when one fails."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def bench(name):
    return importlib.import_module(f"bench.{name}")


@pytest.mark.parametrize("name", ["decode", "compiled", "scan-peers", "prefill", "kernels", "Qwen3-8B", "SmolLM3-3B"])
def test_every_part_runs_dry(name):
    parts = bench("parts")
    torch._dynamo.reset()
    with torch.enable_grad():
        rows = list(parts.PARTS[name].run(parts.Plan("cpu", dry=True)))
    torch._dynamo.reset()
    assert (rows and "measured" in {row.status for row in rows}) or name == "scan-peers"
    assert not [row.note for row in rows if row.status == "refused"]
    # What is absent is a peer, never a part that failed.
    expected = ("not importable", "released package", "unrolls")
    assert not [row for row in rows if row.status == "absent" and not any(text in row.note for text in expected)]
    json.dumps([row.to_dict() for row in rows], allow_nan=False)


def test_all_parts_are_dried_above():
    assert len(bench("parts").PARTS) == 7


def test_one_command(tmp_path, capsys):
    assert bench("gpu").main(["--dry-run", "--only", "kernels", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    result = bench("results").load(path)
    assert path.name.endswith("-kernels-dry-run.json") and not result.whole
    names = {row.name for row in result.rows}
    assert {"kernel/scan", "kernel/step", "kernel/steer_heads_", "kernel/decode_", "copy"} <= names
    assert "kernel/decode_" in capsys.readouterr().out


def part(tmp_path, monkeypatch, code, seconds=60):
    """Rows of a part whose process runs ``code``, with the row file in ``sys.argv[-1]``."""
    gpu = bench("gpu")
    original = gpu.subprocess.Popen

    def popen(command, **kwargs):
        return original([sys.executable, "-c", code, command[-1]], **kwargs)

    monkeypatch.setattr(gpu.subprocess, "Popen", popen)
    options = gpu.parse(["--dry-run", "--output", str(tmp_path)])
    return list(gpu.part_rows("kernels", options, seconds))


ONE_ROW = 'import sys; open(sys.argv[-1], \'w\').write(\'{"name": "first", "values": {"x": 1}}\\n\'); '


def test_a_part_that_hangs_keeps_its_rows(tmp_path, monkeypatch):
    rows = part(tmp_path, monkeypatch, ONE_ROW + "import time; time.sleep(60)", seconds=3)
    assert [(row.name, row.status) for row in rows] == [("first", "measured"), ("kernels", "absent")]
    assert "cut off after 3 s" in rows[1].note


@pytest.mark.parametrize(
    "error, status", [("ValueError('wrong')", "refused"), ("RuntimeError('OutOfMemoryError')", "absent")]
)
def test_a_part_that_fails_keeps_its_rows(tmp_path, monkeypatch, error, status):
    rows = part(tmp_path, monkeypatch, ONE_ROW + f"raise {error}")
    assert [(row.name, row.status) for row in rows] == [("first", "measured"), ("kernels", status)]
    assert ("ValueError: wrong" if status == "refused" else "out of memory") in rows[1].note


def test_parts_without_time_are_named(tmp_path, monkeypatch):
    gpu = bench("gpu")
    options = gpu.parse(["--seconds", "1", "--skip-tests", "--output", str(tmp_path)])
    rows = [row for rows in gpu.measure(options, gpu.time.perf_counter()) for row in rows]
    assert [row.name for row in rows] == list(gpu.PARTS)
    assert {(row.status, row.note) for row in rows} == {("absent", "left out: no time")}


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("gpu").main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_wrong_kernel_is_refused(monkeypatch):
    kernels, problems = bench("kernels"), bench("problems")
    right = problems.apply

    def wrong(case, inputs, ops, heads):
        out = right(case, inputs, ops, heads)
        return out if ops is problems._Exact else tuple(tensor * 1.02 for tensor in out)

    monkeypatch.setattr(problems, "apply", wrong)
    rows = list(kernels.rows(kernels.tiny_sweep(), "cpu", 2))
    assert {row.status for row in rows} == {"refused"} and all("relative error" in row.note for row in rows)


def test_what_does_not_fit_is_named(monkeypatch):
    kernels = bench("kernels")
    monkeypatch.setattr(kernels, "room", lambda device: 1 << 20)
    (row,) = kernels.rows([kernels.Case("steer", 131_072, 512)], "cpu", 2)
    assert row.status == "absent" and "does not fit the device: " in row.note


def test_the_sweep_covers_what_it_says():
    cases = bench("kernels").full_sweep()
    plain = {"scan", "step", "read", "steer", "steer_heads_", "decode_"}
    assert {c.kernel for c in cases} == plain | {"scan_gradient", "read_gradient", "steer_gradient"}
    scans = [c for c in cases if c.kernel == "scan"]
    assert {c.tokens for c in scans} >= {1, 131_072} and {c.batch for c in scans} >= {1, 512}
    assert {c.rank for c in scans} == {4, 8, 16, 32} and {c.heads for c in scans} == {1, 4}
    assert len(set(cases)) == len(cases)


def test_least_bytes_of_a_scan():
    """32 numbers of 2 bytes in, 8 of 4 bytes out, for each token."""
    problems = bench("problems")
    assert problems.least_bytes(problems.Case("scan", 32768)) == 32768 * (64 + 32) + 2 * 256
