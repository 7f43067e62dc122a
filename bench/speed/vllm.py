"""What a memory costs in vLLM on a CPU: batches answered by a bare engine and by one with an adapter, in turns.

Both engines live in processes of their own, which wait while the other works. Runs where vLLM is installed (make
test-vllm makes such an environment): python -m bench.speed.vllm --output bench/results/vllm
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from deltamem_fast import DeltaMemConfig, patch_model, save_adapter

from ..instrument import backbones, commands, results
from ..instrument.rows import Row, compare, counted, measured, refused
from ..instrument.timing import in_turns
from .model import loud

DIRECTORY = results.DIRECTORY / "vllm"
MARK = "answer: "
# Name → tokens of a prompt, tokens of an answer.
WORK = {"prefill": (512, 1), "decode": (16, 64), "both": (128, 64)}
# Of the larger one a prompt takes half a minute: decoded alone, in fewer turns.
MODELS = {"Qwen3-48M": (tuple(WORK), 1), "Qwen3-0.6B": (("decode",), 3)}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def checkpoint(name: str, quick: bool, dtype: str, directory: Path) -> None:
    """Random weights in a backbone's shape, and a loud adapter of the released recipe, in ``directory``."""
    # vLLM's attention for a CPU has no heads of 16 numbers.
    tiny = {"head_dim": 32, "vocab_size": 512} if quick else {}
    config = backbones.configuration(name, quick, **tiny)
    torch.manual_seed(0)
    model = backbones.build(config, getattr(torch, dtype), "cpu")
    model.save_pretrained(directory)
    with torch.no_grad():
        loud(patch_model(model, DeltaMemConfig()))
    save_adapter(model, directory / "adapter")


class Engine:
    """An engine in a process of its own."""

    def __init__(self, directory: Path, memory: bool, settings: dict):
        job = json.dumps({"directory": str(directory), "memory": memory, "settings": settings})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.speed.vllm", "--engine", job], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT | os.environ,
        )  # fmt: skip
        self.block_bytes = self._answer()

    def __call__(self, requests: int, prompt: int, answer: int, mode: str, seed: int):
        """Seconds of a batch as the engine's own clock has them, and the first tokens of its answers."""
        self._process.stdin.write(json.dumps([requests, prompt, answer, mode, seed]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise OSError(f"an engine ended with status {self._process.wait()}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve(job: dict) -> None:
    """The child: an engine that answers jobs from stdin until that ends."""
    from vllm import LLM, SamplingParams

    overrides = {
        "architectures": [job["settings"].pop("architecture")], "delta_mem_adapter": f"{job['directory']}/adapter",
    }  # fmt: skip
    llm = LLM(
        job["directory"], hf_overrides=overrides if job["memory"] else {}, skip_tokenizer_init=True,
        enable_prefix_caching=False, **job["settings"],
    )  # fmt: skip
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    [groups] = llm.collective_rpc(_block_bytes)
    print(f"\n{MARK}{json.dumps(groups)}", flush=True)
    for line in sys.stdin:
        requests, prompt, answer, mode, seed = json.loads(line)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, vocabulary, (requests, prompt), generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        run = functools.partial(llm.generate, use_tqdm=False)
        if mode:
            from deltamem_fast import MemoryState
            from deltamem_fast.vllm.offline import generate, memory_model

            given = {} if mode == "none" else {"memory": MemoryState.zeros(memory_model(llm), requests)}
            run = functools.partial(generate, llm, use_tqdm=False, mode=mode, **given)
        start = time.perf_counter()
        outputs = run([{"prompt_token_ids": each} for each in ids], params)
        seconds = time.perf_counter() - start
        first = [list(output.outputs[0].token_ids)[:8] for output in outputs]
        print(f"\n{MARK}{json.dumps([seconds, first])}", flush=True)


def _block_bytes(worker) -> int:
    """Bytes of a block in all layers."""
    found = 0
    for group in worker.model_runner.kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        # Layers of one kind share a specification; those of several have one each, under one for all.
        found += spec.page_size_bytes * (1 if hasattr(spec, "kv_cache_specs") else len(group.layer_names))
    return found


@contextlib.contextmanager
def engines(options: argparse.Namespace, model: str) -> Iterator[tuple[Engine, Engine]]:
    """A bare engine and one with an adapter."""
    architecture = "DeltaMemLlamaForCausalLM" if "SmolLM2" in model else "DeltaMemQwen3ForCausalLM"
    settings = {
        "architecture": architecture, "dtype": options.dtype, "enforce_eager": options.eager,
        "max_model_len": 1024, "max_num_seqs": options.requests, "max_num_batched_tokens": 2048,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(model, options.quick, options.dtype, Path(folder))
        bare = Engine(Path(folder), False, settings)
        try:
            memory = Engine(Path(folder), True, settings)
            try:
                yield bare, memory
            finally:
                memory.close()
        finally:
            bare.close()


def rows(options: argparse.Namespace, model: str) -> list[Row]:
    """Rows of each kind of work with a model, and of the cache."""
    where = {"model": ("tiny " if options.quick else "") + model, "dtype": options.dtype, "eager": options.eager}
    works, fewer = MODELS.get(model, (tuple(WORK), 1))
    found = []
    with engines(options, model) as (bare, memory):
        for work in options.work or works:
            prompt, answer = WORK[work]
            if options.quick:
                prompt, answer = max(prompt // 8, 8), max(answer // 8, 1)
            sizes = where | {"batch": options.requests, "tokens": prompt + answer, "prompt": prompt, "answer": answer}
            batch = (options.requests, prompt, answer)
            _, wanted = bare(*batch, "", 0)
            if memory(*batch, "none", 0)[1] != wanted or memory(*batch, "write", 0)[1] == wanted:
                found.append(refused(f"{work}/memory", sizes, "mode none is not the bare model, or write is"))
                continue
            variants = {
                "bare": lambda n, batch=batch: bare(*batch, "", n),
                "memory": lambda n, batch=batch: memory(*batch, "", n),
                "memory brought and taken": lambda n, batch=batch: memory(*batch, "write", n),
            }
            times = in_turns(variants, max(options.turns // fewer, 1), "cpu", warm_up=1)
            for name, seconds in times.items():
                row = measured(f"{work}/{name}", sizes, seconds)
                found.append(row if name == "bare" else compare(row, "bare", times["bare"], seconds))
        share = memory.block_bytes / bare.block_bytes - 1
        found.append(counted("cache/memory", where, bytes=memory.block_bytes, bare=bare.block_bytes, share=share))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.vllm", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of the JSON (default: %(default)s)")
    parser.add_argument(
        "--model", nargs="+", default=list(MODELS), choices=sorted(backbones.KINDS), help="default: both"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=8, help="of a batch (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=21, help="default: %(default)s")
    parser.add_argument("--work", nargs="+", choices=WORK, help="default: all, with a large model decode")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--quick", action="store_true", help="a tiny model, little work; stays out of docs/results")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine:
        serve(json.loads(options.engine))
        return 0
    said = {"quick": options.quick, "turns": options.turns}
    return commands.status_of(
        parser.prog,
        lambda: commands.finish([row for model in options.model for row in rows(options, model)], said, options.output),
    )


if __name__ == "__main__":
    sys.exit(main())
