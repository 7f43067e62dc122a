"""Every part of ``make gpu`` on a CUDA device that is not there, kernels in the interpreter: what runs on a GPU alone
runs here once, at tiny sizes, and where a GPU would refuse it, it fails."""

import importlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import pretended_cuda

from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.triton.launch import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="test_bench_gpu.py runs it in a process of its own")


def bench(name):
    return importlib.import_module(f"bench.{name}")


@pytest.fixture(params=["H100"])
def gpu(request, monkeypatch):
    """The device. Kernels run in what is checked and are only counted in what is timed."""
    problems, timing, model = bench("speed.problems"), bench("instrument.timing"), bench("speed.model")
    monkeypatch.setattr(problems, "LAYOUT", HeadLayout(4, 2, 2, 16, 16))
    monkeypatch.setattr(problems, "OUT", 40)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1 << 12)
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 16)
    for made in (timing._flush_buffer, timing.copy_bandwidth):
        made.cache_clear()
    with pretended_cuda.device(request.param) as device:
        for module, name in ((problems, "check"), (model, "make")):
            monkeypatch.setattr(module, name, runs_kernels(device, getattr(module, name)))
        device.idle = True
        yield device
    for made in (timing._flush_buffer, timing.copy_bandwidth):
        made.cache_clear()


def runs_kernels(device, function, runs=True):
    def run(*args, **kwargs):
        device.idle = not runs
        try:
            return function(*args, **kwargs)
        finally:
            device.idle = runs

    return run


def rows_of(part, **options):
    parts = bench("speed.parts")
    with torch.enable_grad():
        return list(parts.PARTS[part].run(parts.Plan("cuda", dry=True, **options)))


@pytest.mark.parametrize("name", ["decode", "prefill", pytest.param("SmolLM3-3B", marks=pytest.mark.thorough)])
def test_models(gpu, name):
    rows = rows_of(name)
    assert not [row.note for row in rows if row.status == "refused"]
    patched = [row for row in rows if row.name.endswith("/patched")]
    assert patched and all(row.parameters["backend"] == "triton" and "unpatched" in row.ratios for row in patched)
    assert gpu.calls["captures"] == (0 if name == "prefill" else 4)
    if name == "prefill":
        assert all(row.values["peak_memory"] > 0 and "extra_memory" in row.values for row in patched)


def test_every_kernel(gpu):
    rows = rows_of("kernels")
    assert [row.name for row in rows][:2] == ["copy", "kernel/scan"] and len(rows) == 10
    for row in rows[1:]:
        assert row.status == "measured", row.note
        assert row.values["back_to_back"] > 0 and row.values["roofline"] > 0 and row.error > 0
    # Four sets, then the graph of eight calls.
    assert gpu.calls["captures"] == 9 * 5


def test_a_graph_is_what_it_was_captured_from(gpu):
    """A captured forward, replayed, decodes the tokens of the eager one: its position and memory move on."""
    model, decode, timing = bench("speed.model"), bench("speed.decode"), bench("instrument.timing")
    models = model.make("Qwen3-4B", "cuda", tiny=True, peer=False)
    gpu.idle = False
    ids = model.random_ids(256, 3, 12, "cuda")
    with torch.no_grad():
        eager, graph = (decode.StaticDecode(models.variants["patched"], ids, 20) for _ in range(2))
        replay = timing.capture(graph.step, "cuda", 3)
        for _ in range(3):  # the warm-up
            eager.step()
        for _ in range(4):
            replay()
            eager.step()
            assert torch.equal(eager.token, graph.token)


def delta_rule(state, q, k, v, keep, erase, write):
    """The recurrence of SPEC with its factors given, rows of [B, T, r]."""
    reads = []
    for t in range(q.shape[1]):
        column = [x[:, t, :, None] for x in (q, k, v, keep, erase, write)]
        q_t, k_t, v_t, keep_t, erase_t, write_t = column
        reads.append((state @ q_t)[..., 0])
        state = keep_t * state - erase_t * (state @ k_t) @ k_t.mT + write_t * v_t @ k_t.mT
    return state, torch.stack(reads, 1)


def test_peers(gpu, monkeypatch):
    peers, kernels = bench("speed.peers"), bench("speed.kernels")
    found = {
        "deltamem.core.delta": SimpleNamespace(),
        "deltamem.kernels.affine_scan": SimpleNamespace(triton_affine_scan=delta_rule),
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=lambda q, *_, **__: (q, None)),
    }
    monkeypatch.setattr(peers, "_import", found.get)
    gpu.idle = False
    for name in ("capture", "in_turns", "peak_memory"):  # what comes after the comparison with the peer
        monkeypatch.setattr(kernels, name, runs_kernels(gpu, getattr(kernels, name), runs=False))
    parts = bench("speed.parts")
    rows = list(parts.scan_peers(TinyPlan("cuda", dry=True)))
    assert [(row.name, row.status) for row in rows] == [
        ("scan/triton", "measured"), ("scan-gradient/triton", "measured"), ("scan/fla", "measured")
    ], [row.note for row in rows]  # fmt: skip
    assert all({"released", "released, ours launched from Python"} <= row.ratios.keys() for row in rows[:2])
    assert rows[1].values["memory_to_released"] > 0


class TinyPlan(bench("speed.parts").Plan):
    scans = (6,)
    gradients = (6,)
    turns = 2


def test_what_ncu_watches(gpu):
    counters = bench("speed.counters")
    gpu.idle = False
    assert counters.main(["decode_:1:1", "step:1:2", "scan:5:1"]) == 0
    assert gpu.calls["launches"] == 10  # a scan is three launches
    assert counters.main(["scan:5"]) == 2


def test_a_capture_that_waits_fails(gpu):
    timing = bench("instrument.timing")
    number = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="stream is capturing"):
        timing.capture(lambda: number.sum().item(), "cuda")
    with pytest.raises(RuntimeError, match="stream is capturing"):
        timing.capture(lambda: number + torch.tensor([1.0], device="cuda"), "cuda")
    with pytest.raises(RuntimeError, match="same device"):
        number + torch.ones(3)
    assert not torch.cuda.is_current_stream_capturing()


def test_memory_is_counted(gpu):
    timing = bench("instrument.timing")
    assert timing.peak_memory(lambda: torch.empty(1 << 20, device="cuda").add_(1), "cuda") == 4 << 20
    gpu.memory.total = gpu.memory.now + (1 << 20)
    case = bench("speed.problems").Case("steer", 4096, 512)
    (row,) = bench("speed.kernels").rows([case], "cuda", 2)
    assert row.status == "absent" and "does not fit the device" in row.note


@pytest.mark.parametrize("gpu", ["H100", "H200"], indirect=True)
def test_a_part_s_process_and_the_file_it_ends_in(gpu, tmp_path, monkeypatch, capsys):
    run, results = bench("gpu"), bench("instrument.results")

    def part_rows(name, options, seconds):
        path = tmp_path / f"{name}.jsonl"
        # Of a dry run, with the device: what --part does here.
        monkeypatch.setattr(run, "Plan", lambda device, dry, full, progress: TinyPlan("cuda", True, full, progress))
        arguments = run.parse(["--part", name, "--rows", str(path)])
        assert run.run_part(arguments) == 0
        return [run.from_dict(run.json.loads(line)) for line in path.read_text().splitlines()]

    monkeypatch.setattr(run, "part_rows", part_rows)
    monkeypatch.setattr(run, "limit_of", lambda name: 60.0)
    assert run.main(["--only", "scan-peers", "counters", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    device = "nvidia-h100-80gb-hbm3" if gpu.name.startswith("NVIDIA H100") else "nvidia-h200"
    assert path.name.startswith(device + "-driver") and results.load(path).head["device"] == gpu.name
    assert "counters" in capsys.readouterr().out
