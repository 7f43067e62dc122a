"""The run on a GPU, dry: the same parts with tiny sizes on a CPU, and what happens when one fails."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def bench(name):
    return importlib.import_module(f"bench.{name}")


NAMES = "decode scan-peers kernels counters prefill compiled compiled-kernels Qwen3-8B SmolLM3-3B".split()
NOTHING_MEASURED = ("scan-peers", "counters", "compiled-kernels")  # what they compare with is not there


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if name == "compiled" else ()) for name in NAMES]
)  # torch.compile of whole models takes half a minute
def test_every_part_runs_dry(name):
    parts = bench("speed.parts")
    torch._dynamo.reset()
    with torch.enable_grad():
        rows = list(parts.PARTS[name].run(parts.Plan("cpu", dry=True)))
    torch._dynamo.reset()
    assert (rows and "measured" in {row.status for row in rows}) or name in NOTHING_MEASURED
    assert not [row.note for row in rows if row.status == "refused"]
    # What is absent is a peer, never a part that failed.
    expected = ("not importable", "released package", "unrolls", "dry run")
    assert not [row for row in rows if row.status == "absent" and not any(text in row.note for text in expected)]
    json.dumps([row.to_dict() for row in rows], allow_nan=False)


def test_all_parts_are_dried_above():
    assert list(bench("speed.parts").PARTS) == NAMES


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("which", "least"), [("not thorough", 10), pytest.param("thorough", 1, marks=pytest.mark.soak)]
)
def test_on_a_pretended_device(which, least):
    """What runs on a GPU alone, in a process whose kernels are interpreted."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
    command += [str(ROOT / "tests" / "pretended")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert passed and int(passed[1]) >= least, done.stdout[-2000:]


def test_most_telling_parts_fit_the_time(capsys):
    """Correctness, the decode ratio, the scan ratio and each kernel are begun within nine minutes."""
    gpu = bench("gpu")
    assert gpu.main(["--plan"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    parts = [*lines][:-1]
    assert parts == ["tests", *NAMES]
    begins = [int(lines[name][-1]) for name in ("tests", "decode", "scan-peers", "kernels", "counters", "prefill")]
    assert begins == sorted(begins) and begins[-1] < 480
    total = re.search(r"in all (\d+) of 520 s", " ".join(lines["in"]))
    assert int(total[1]) <= 520
    # Each part gets more than it should take, and each launches and compiles something.
    assert all(int(lines[name][-3]) < int(lines[name][-2]) for name in parts[:6])
    assert all(part.estimate(gpu.Plan("cuda")).compiled > 0 for part in gpu.PARTS.values())


def test_launches_are_counted_without_memory():
    budget, problems = bench("speed.budget"), bench("speed.problems")
    assert [name for name, *_ in budget.launched(problems.Case("decode_", 1, 16))] == ["decode_kernel"]
    assert [name for name, *_ in budget.launched(problems.Case("steer", 131_072, 512))] == ["steer_kernel"]
    long = [name for name, *_ in budget.launched(problems.Case("scan", 131_072))]
    assert len(long) > 1 and long[-2:] == ["chunk_scan_kernel", "repair_kernel"]
    few, many = (budget.of_kernels([problems.Case("step")], turns) for turns in (5, 500))
    assert few.compiled == many.compiled == 1 and few.launches < many.launches and few.seconds < many.seconds


GPU = "gpu"  # bench.speed.suite takes files in which the marker is written out for files with tests for a GPU
TESTS = f"""
import time
import pytest
pytestmark = pytest.mark.{GPU}

@pytest.mark.parametrize("n", range(7))
def test_passes(n):
    pass
"""

TORCH = """
import types
cuda = types.SimpleNamespace(is_available=lambda: True)
set_num_threads = manual_seed = id
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A folder with tests beside a copy of the project's conftest, and what runs it: (tests, seconds) → row.

    What stands for torch there has a GPU, and is imported at once.
    """
    module = bench("speed.suite")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    soak: x\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer to import than all of these tests

    def run(tests, seconds=60):
        (tmp_path / "test_some.py").write_text(tests)
        return module.run(tmp_path / "out", seconds, False, processes=2)

    return run


def test_each_test_runs_in_one_process(suite, tmp_path):
    row = suite(TESTS)
    assert row.status == "measured" and row.note == "all passed"
    assert (row.values["passed"], row.values["failed"], row.parameters["processes"]) == (7, 0, 2)
    assert not (tmp_path / "out").exists()


def test_a_failing_test_is_named(suite, tmp_path):
    row = suite(TESTS + "\ndef test_fails():\n    assert 0, 'for a reason'\n")
    assert row.status == "refused" and row.note == "failed: test_some.py::test_fails"
    assert row.values["passed"] == 7 and "for a reason" in (tmp_path / "out" / "gpu-tests.txt").read_text()


def test_a_hanging_test_costs_no_outcome(suite):
    start = time.perf_counter()
    row = suite(TESTS + "\ndef test_hangs():\n    time.sleep(300)\n", seconds=8)
    assert row.status == "refused" and row.note.startswith("not through after 8 s")
    assert row.values["passed"] == 7 and time.perf_counter() - start < 60


def test_what_pytest_cannot_import_is_refused(suite):
    row = suite(f"import nothing_of_this_name  # mark.{GPU}\n")
    assert row.status == "refused" and "pytest ended with" in row.note


def test_skipped_tests_alone_are_no_success(suite):
    row = suite(TESTS.replace("    pass", "    pytest.skip('x')"))
    assert row.status == "refused" and row.note == "no test passed" and row.values["skipped"] == 7


# As ncu --csv --print-units base writes it: its own lines, the program's, then a line a metric.
HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"\n'
)


def metric(number, kernel, name, unit, value):
    return (
        f'"{number}","4711","python3.12","127.0.0.1","{kernel}","1","7","(32, 1, 1)","(90, 1, 1)","0","9.0",'
        f'"Command line profiler metrics","{name}","{unit}","{value}"\n'
    )


def ncu_output():
    text = "==PROF== Connected to process 4711 (/usr/bin/python3.12)\nsome line of the program\n"
    text += '==PROF== Profiling "decode_kernel" - 0: 0%....50%....100% - 2 passes\n==PROF== Disconnected\n' + HEAD
    text += metric(0, "void at::native::fill(int, float)", "smsp__inst_executed.sum", "inst", "12")
    text += metric(1, "decode_kernel", "dram__bytes_read.sum", "byte", "1,024")
    text += metric(1, "decode_kernel", "dram__bytes_write.sum", "Kbyte", "2.5")
    text += metric(1, "decode_kernel", "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum", "sector", "3,000")
    text += metric(1, "decode_kernel", "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum", "sector", "n/a")
    return text + metric(1, "decode_kernel", "smsp__inst_executed.sum", "inst", "41,000")


def test_ncu_s_lines_are_read():
    counters = bench("speed.counters")
    fill, decode = counters.parse(ncu_output())
    assert fill == {"kernel": "void at::native::fill", "instructions": 12}
    assert decode == {
        "kernel": "decode_kernel", "dram_read": 1024, "dram_written": 2500, "load_sectors": 3000, "instructions": 41000
    }  # fmt: skip
    assert counters.parse("==ERROR== nothing\n") == []
    ((case, launch),) = counters.assign([fill, decode], counters.CASES)
    assert case == counters.CASES[0] and launch is decode


def emulated(kernel="decode", status="measured", **more):
    parameters = {"tokens": 1, "batch": 1, "rank": 8, "heads": 1, "dtype": "bfloat16", **more}
    values = {"instructions": 40000, "load_sectors": 3000, "store_sectors": 100}
    return {"name": f"executed/{kernel}", "parameters": parameters, "values": values, "status": status}


def test_counters_stand_beside_the_emulator_s(tmp_path):
    counters = bench("speed.counters")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"rows": 3, "time": null}')
    assert counters.emulated(tmp_path) == []
    rows = [emulated("step", status="refused"), emulated(parts=1), emulated(batch=4), emulated()]
    head = dict.fromkeys(bench("instrument.results").KEYS) | {"format_version": 2, "time": "2026"}
    (tmp_path / "new.json").write_text(json.dumps(head | {"rows": rows}))
    figures = counters.emulated(tmp_path)
    assert len(figures) == 3
    row = counters.row_of(counters.parse(ncu_output())[1], counters.CASES[0], figures)
    assert row.name == "counters/decode_kernel" and not row.note
    assert row.values["instructions_to_emulated"] == 41 / 40 and row.values["load_sectors_to_emulated"] == 1
    assert row.values["emulated_store_sectors"] == 100 and "store_sectors_to_emulated" not in row.values
    assert "load sectors ÷ emulated 1.000" in bench("instrument.tables").plain_table([row])
    assert "no emulator's figures" in counters.row_of({"kernel": "decode_kernel"}, counters.CASES[3], figures).note


SAYS = {
    "ok": (ncu_output(), 0, "ncu ended with 0"),
    "forbidden": ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access\n", 1, "administrator"),
    "broken": ("==ERROR== The application returned an error code (1).\n", 1, "ncu: The application returned"),
    "silent": ("", 9, "ncu ended with 9 and no counters: no message"),
    "slow": (None, 0, "took more than 1 s"),
}


@pytest.mark.parametrize("what", SAYS)
def test_what_keeps_ncu_from_counting_is_said(what, tmp_path, monkeypatch):
    counters, parts = bench("speed.counters"), bench("speed.parts")
    text, status, note = SAYS[what]
    script = tmp_path / "ncu"
    (tmp_path / "says").write_text(text or "")
    wait = "exec sleep 60\n" if text is None else ""
    script.write_text(f"#!/bin/sh\n{wait}cat {tmp_path / 'says'}\nexit {status}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(counters, "SECONDS", 1)
    monkeypatch.setattr(counters, "emulated", list)
    rows = list(counters.rows(parts.Plan("cuda")))
    absent = [row for row in rows if row.status == "absent"]
    assert all(note in row.note for row in absent) and len(absent) == len(counters.CASES) - (what == "ok")
    assert [row.name for row in rows if row.status == "measured"] == ["counters/decode_kernel"] * (what == "ok")


def test_without_ncu(monkeypatch):
    counters = bench("speed.counters")
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    (row,) = counters.rows(bench("speed.parts").Plan("cuda"))
    assert row.status == "absent" and "not installed" in row.note


def test_floors_of_both_gpus_are_in_the_table():
    rows, devices = bench("instrument.rows"), bench("instrument.devices")
    row = rows.measured("kernel/steer", {"tokens": 1}, [1e-3, 1e-3])
    row.values["bytes"] = 3 * 10**9
    assert "floor H100 1 ms, H200 698 µs" in bench("instrument.tables").plain_table([row])
    assert {known.name: known.copy for known in devices.KNOWN} == {"H100": 3.0e12, "H200": 4.3e12}


def test_one_command(tmp_path, capsys):
    assert bench("gpu").main(["--dry-run", "--only", "kernels", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    result = bench("instrument.results").load(path)
    assert path.name.endswith("-kernels-dry-run.json") and not result.whole
    names = {row.name for row in result.rows}
    assert {"kernel/scan", "kernel/step", "kernel/steer_heads_", "kernel/decode_", "copy"} <= names
    assert "kernel/decode_" in capsys.readouterr().out


def part(tmp_path, monkeypatch, code, seconds=60):
    """Rows of a part whose process runs ``code``, with the row file in ``sys.argv[-1]``."""
    gpu, suite = bench("gpu"), bench("speed.suite")
    original = suite.subprocess.Popen

    def popen(command, **kwargs):
        return original([sys.executable, "-c", code, command[-1]], **kwargs)

    monkeypatch.setattr(suite.subprocess, "Popen", popen)
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
    kernels, problems = bench("speed.kernels"), bench("speed.problems")
    right = problems.apply

    def wrong(case, inputs, ops):
        out = right(case, inputs, ops)
        return out if ops is problems.Exact else tuple(tensor * 1.02 for tensor in out)

    monkeypatch.setattr(problems, "apply", wrong)
    rows = list(kernels.rows(kernels.tiny_sweep(), "cpu", 2))
    assert {row.status for row in rows} == {"refused"} and all("relative error" in row.note for row in rows)


def test_what_does_not_fit_is_named(monkeypatch):
    kernels = bench("speed.kernels")
    monkeypatch.setattr(kernels, "room", lambda device: 1 << 20)
    (row,) = kernels.rows([kernels.Case("steer", 131_072, 512)], "cpu", 2)
    assert row.status == "absent" and "does not fit the device: " in row.note


def test_the_sweep_covers_what_it_says():
    cases = bench("speed.kernels").full_sweep()
    plain = {"scan", "step", "read", "steer", "steer_heads_", "decode_"}
    assert {c.kernel for c in cases} == plain | {"scan_gradient", "read_gradient", "steer_gradient"}
    scans = [c for c in cases if c.kernel == "scan"]
    assert {c.tokens for c in scans} >= {1, 131_072} and {c.batch for c in scans} >= {1, 512}
    assert {c.rank for c in scans} == {4, 8, 16, 32} and {c.heads for c in scans} == {1, 4}
    assert len(set(cases)) == len(cases)


def test_least_bytes_of_a_scan():
    """32 numbers of 2 bytes in, 8 of 4 bytes out, for each token."""
    problems = bench("speed.problems")
    assert problems.least_bytes(problems.Case("scan", 32768)) == 32768 * (64 + 32) + 2 * 256
