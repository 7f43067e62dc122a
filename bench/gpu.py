"""On a machine with a GPU: its tests, then kernel and model timings; JSON under --output, a table last.

python -m bench.gpu [--output DIR] [--skip-tests]        (make gpu)

Stays under nine minutes: the tests get five, and a part that would start later than its deadline is named and left
out.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deltamem_fast.files import write_json

from . import machine
from .rows import Row, absent, compare, measured, plain_table, refused

ROOT = machine.ROOT
TEST_SECONDS = 300
DEADLINE = 480  # seconds after the start at which no further part begins
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU of today


def run_tests(seconds: float) -> Row:
    """pytest -m gpu in a process of its own, as a row."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests")]
    if importlib.util.find_spec("xdist"):
        # most of the time goes into compiling kernels
        command += ["-n", str(min(8, machine.cores()))]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return refused("tests", {"marker": "gpu"}, f"not through after {seconds:.0f} s")
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    if done.returncode:
        return refused("tests", {"marker": "gpu"}, last)
    return absent("tests", last, {"marker": "gpu", "seconds": round(time.perf_counter() - start)})


def device_times(call: Callable[[int], object], repeats: int = 30) -> list[float]:
    """Seconds of each call by device events, the L2 cache overwritten before each; ``call`` gets its number."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for n in range(5):
        call(n)
    events = []
    for n in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(n)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def kernel_rows() -> list[Row]:
    """scan, step and steer at a few sizes, each compared with the reference first."""
    from deltamem_fast import reference
    from deltamem_kernels import ops
    from deltamem_kernels.rule import DeltaRule

    rows = []
    rule = DeltaRule(8)
    bias = torch.full((rule.bias_width,), -1.5, device="cuda")

    def tokens(*shape):
        return torch.randn(*shape, rule.width, device="cuda", dtype=torch.bfloat16)

    sample = tokens(2, 300)
    ours = ops.scan(sample, bias, None, rule)
    exact = reference.scan(sample.cpu(), bias.cpu(), None, rule, dtype=torch.float64)
    error = ((ours.reads.cpu() - exact.reads).norm() / exact.reads.norm()).item()
    if not error < 1e-5:
        return [refused("scan", {}, f"relative error {error:.1e} against float64, allowed under 1e-5", error)]
    with torch.no_grad():
        for batch, length in ((1, 128), (1, 2048), (1, 8192), (1, 32768), (1, 131072), (16, 2048)):
            inputs = [tokens(batch, length) for _ in range(4)]
            times = device_times(lambda n, inputs=inputs: ops.scan(inputs[n % 4], bias, None, rule))
            rows.append(measured("scan", {"tokens": length, "batch": batch, "r": 8, "H": 1}, times, error))
        for batch in (1, 16, 512):
            inputs = [tokens(batch) for _ in range(4)]
            state = torch.zeros(batch, 1, 8, 8, device="cuda")
            skipped = torch.zeros(batch, dtype=torch.int32, device="cuda")
            times = device_times(lambda n, i=inputs, s=state, k=skipped: ops.step(i[n % 4], bias, s, rule, skipped=k))
            rows.append(measured("step", {"tokens": 1, "batch": batch, "r": 8, "H": 1}, times))
        weight = torch.randn(4096, 8, device="cuda", dtype=torch.bfloat16)
        for length in (1, 8192):
            base = [torch.randn(1, length, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
            reads = torch.randn(1, length, 8, device="cuda")
            times = device_times(lambda n, b=base, r=reads: ops.steer(b[n % 4], r, weight, 2.0))
            rows.append(measured("steer", {"tokens": length, "batch": 1, "out": 4096}, times))
    return rows


def model_rows() -> list[Row]:
    """Prefill and decode of a random Qwen3-4B in bfloat16, eager, patched against not patched."""
    from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

    from deltamem_fast import DeltaMemConfig, memory_disabled, patch_model

    config = Qwen3Config(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        bare = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).eval()
    patched = patch_model(copy.deepcopy(bare), DeltaMemConfig())
    count = sum(p.numel() for p in bare.parameters())
    rows = []
    with torch.no_grad():
        probe = torch.randint(config.vocab_size, (1, 64), device="cuda")
        with memory_disabled(patched):
            if not torch.equal(patched(probe).logits, bare(probe).logits):
                return [refused("model", {}, "logits differ from the backbone's with the memory disabled")]
        for batch, length, steps in ((1, 8192, 32), (16, 512, 32)):
            phases: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
            for turn in range(6):
                ids = torch.randint(config.vocab_size, (batch, length + steps), device="cuda")
                for name, model in (("unpatched", bare), ("patched", patched))[:: 1 if turn % 2 else -1]:
                    cache = DynamicCache(config=config)
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
                    torch.cuda.synchronize()
                    middle = time.perf_counter()
                    for t in range(length, length + steps):
                        model(ids[:, t : t + 1], past_key_values=cache, logits_to_keep=1)
                    torch.cuda.synchronize()
                    if turn:  # the first compiles
                        phases["prefill"].setdefault(name, []).append(middle - start)
                        phases["decode"].setdefault(name, []).append(time.perf_counter() - middle)
            for phase, tokens, target in (("prefill", length, 0.99), ("decode", steps, 1.0)):
                sizes = {"tokens": tokens, "batch": batch, "parameters": count, "dtype": "bfloat16"}
                plain, ours = phases[phase]["unpatched"], phases[phase]["patched"]
                rows.append(measured(f"{phase}/unpatched", sizes, plain))
                row = measured(f"{phase}/patched", sizes, ours)
                rows.append(compare(row, [a / b for a, b in zip(plain, ours)], target))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run everything; the exit status is 1 if the tests or a check failed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="GPU tests and timings.")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON")
    parser.add_argument("--skip-tests", action="store_true", help="timings alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: error: PyTorch sees no CUDA device here; make test runs without one", file=sys.stderr)
        return 2
    start = time.perf_counter()
    rows = [] if options.skip_tests else [run_tests(TEST_SECONDS)]
    for name, part in (("kernels", kernel_rows), ("model", model_rows)):
        if time.perf_counter() - start > DEADLINE:
            rows.append(absent(name, "left out: no time"))
            continue
        try:
            rows += part()
        except torch.cuda.OutOfMemoryError as error:
            rows.append(absent(name, f"left out: does not fit the device ({error})"))
    device = torch.cuda.get_device_name()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    result = {
        "format_version": 1,
        **machine.describe(),
        "device": device,
        "driver": driver,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": [row.to_dict() for row in rows],
    }
    name = f"{machine.slug(device)}-torch{torch.__version__.split('+')[0]}.json"
    path = write_json(options.output / name, result)
    print(plain_table(result["rows"]))
    print(f"{path}  ({time.perf_counter() - start:.0f} s)")
    return 1 if any(row.status == "refused" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
