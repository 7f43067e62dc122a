"""What a guard and less trust cost in time: operators and a small model, each with and without, in turns of one run."""

from __future__ import annotations

import argparse
import dataclasses

import torch

from deltamem_fast import Guard, MemoryState, patch_model, unpatch_model
from deltamem_fast.recall.weights import SHIPPED, load_backbone
from deltamem_kernels.dispatch import operations
from deltamem_kernels.rule import DeltaRule

from ..instrument import results
from ..instrument.rows import Row, compare, measured
from ..instrument.timing import in_turns

DIRECTORY = results.DIRECTORY / "guard"
TURNS, TOKENS, ROWS, REPEATED = 60, 8192, 32, 50
PROMPT, STEPS = 256, 16
ADAPTER = "tsw-r8"


def operator_rows(turns: int, device: str) -> list[Row]:
    """A scan of T tokens, and a step of B rows ``REPEATED`` times; released rule, of the device's own backend."""
    ops, free = operations("auto", torch.device(device)), DeltaRule(8)
    rules = {"free": free, "guarded": Guard().rule(free)}
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*size, free.width, generator=make).to(device) for size in ((1, TOKENS), (ROWS,)))
    bias, state = torch.zeros(8, device=device), torch.zeros(ROWS, 1, 8, 8, device=device)

    def scan(rule: DeltaRule):
        return lambda n: ops.scan(x, bias, None, rule)

    def step(rule: DeltaRule):
        return lambda n: [ops.step(y, bias, state, rule) for _ in range(REPEATED)]

    rows = []
    for name, call, sizes in (("scan", scan, {"tokens": TOKENS}), ("step", step, {"batch": ROWS, "steps": REPEATED})):
        times = in_turns({way: call(rule) for way, rule in rules.items()}, turns, device)
        rows += _pair(f"guard-{name}", sizes, times)
    return rows


def model_rows(turns: int) -> list[Row]:
    """A prompt and decoded tokens of the small shipped model: free, guarded, and with ``trust=0.5``."""
    models = {}
    for way, guard in (("free", False), ("guarded", True), ("trusted less", "auto")):
        models[way], _ = load_backbone(SHIPPED / "backbone")
        patch_model(models[way], SHIPPED / ADAPTER, guard=guard)
    ids = torch.randint(5, 400, (1, PROMPT), generator=torch.Generator().manual_seed(1))

    def prompt(way: str):
        def call(n: int) -> None:
            with torch.no_grad():
                more = {"trust": 0.5} if way == "trusted less" else {}
                models[way](ids, memory=MemoryState.zeros(models[way]), use_cache=False, **more)

        return call

    def decode(way: str):
        def call(n: int) -> None:
            more = {"trust": 0.5} if way == "trusted less" else {}
            memory, cache = MemoryState.zeros(models[way]), None
            with torch.no_grad():
                for t in range(STEPS):
                    cache = models[way](ids[:, t : t + 1], memory=memory, past_key_values=cache, **more).past_key_values

        return call

    rows = []
    for name, call, sizes in (("prompt", prompt, {"tokens": PROMPT}), ("decode", decode, {"tokens": STEPS})):
        rows += _pair(f"guard-model-{name}", sizes, in_turns({way: call(way) for way in models}, turns, "cpu"))
    for model in models.values():
        unpatch_model(model)
    return rows


def _pair(name: str, sizes: dict, times: dict[str, list[float]]) -> list[Row]:
    rows = [measured(f"{name}/{way}", sizes, seconds) for way, seconds in times.items()]
    return [rows[0], *(compare(row, "free", times["free"], times[row.variant]) for row in rows[1:])]


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.memory guard``."""
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each is timed (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure and write."""
    if options.turns < 2:
        raise ValueError(f"--turns: got {options.turns}, allowed 2 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [*operator_rows(options.turns, device), *model_rows(options.turns)]
    arguments = {"quick": options.turns < TURNS, "turns": options.turns, "guard": dataclasses.asdict(Guard())}
    print(results.write(options.output, results.collect(rows, device, arguments)))
    return 0
