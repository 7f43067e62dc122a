"""Prefill and decode of a whole model, eager: patched against the same model without a patch and the released one.

Prompts of hundreds of tokens with what is decoded after them, and long prompts: time and peak memory.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig

from deltamem_fast import DeltaMemConfig, memory_disabled, patch_model
from deltamem_kernels.dispatch import resolve_backend

from ..instrument import backbones
from ..instrument.rows import Row, absent, compare, measured, refused
from ..instrument.timing import in_turns, peak_memory, wall
from . import peers
from .problems import relative_error

TOLERANCE = 1e-4  # of the logits in float32, against the patch computed by the reference
NOISE = 8.0  # in another dtype: times the error that rounding gives the backbone itself
PHASES = ("prefill", "decode")
PREFILLS = 4  # of a variant in a turn, the other variants' in between
BLOCK = 4  # tokens that a variant decodes before another has its turn
BASELINES = {"unpatched": (), "patched": ("unpatched", "released"), "released": ("unpatched",)}  # of ratios
SMALL = ("Qwen3-48M", "SmolLM2-135M")  # what a CPU is measured with


@dataclass(frozen=True)
class Sizes:
    """What is run through a model."""

    prefill: int = 512
    decode: int = 32
    turns: tuple[int, int] = (6, 24)
    budget: float = 75.0  # seconds for a batch size; past it only the least number of turns is completed


FULL = Sizes()
QUICK = Sizes(prefill=32, decode=4, turns=(3, 3))


@dataclass
class Models:
    """One backbone three times: bare, patched and with the released memory.

    Attributes:
        name, dtype, device: of the backbone.
        variants: by name, those whose results were right.
        refusals: by name, why a variant is not timed.
        errors: by name, relative error of the logits.
        count: the backbone's parameters.
    """

    name: str
    dtype: str
    device: str
    variants: dict[str, nn.Module]
    refusals: dict[str, Row] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    count: int = 0

    @property
    def config(self) -> PretrainedConfig:
        """Of the backbone."""
        return self.variants["unpatched"].config

    def parameters(self, **sizes: Any) -> dict[str, Any]:
        """A row's parameters."""
        return {"model": self.name, **sizes, "dtype": self.dtype}

    def ids(self, batch: int, length: int) -> torch.Tensor:
        """Fresh tokens [B, T]."""
        return random_ids(self.config.vocab_size, batch, length, self.device)

    def rows(self, name: str, parameters: dict[str, Any], times: dict[str, list[float]]) -> list[Row]:
        """A row for each variant: timings, ratios to the others, or why there are none."""
        rows = []
        for variant, seconds in times.items():
            row = measured(f"{name}/{variant}", dict(parameters), seconds, self.errors.get(variant))
            for baseline in BASELINES[variant]:
                if baseline in times:
                    compare(row, baseline, times[baseline], seconds)
            if variant == "patched":
                row.parameters["backend"] = resolve_backend("auto", self.device)
            rows.append(row)
        refusals = self.refusals.items()
        return rows + [replace(row, name=f"{name}/{v}", parameters=dict(parameters)) for v, row in refusals]


def random_ids(vocabulary: int, batch: int, length: int, device: str) -> torch.Tensor:
    """Fresh token ids [B, T]."""
    return torch.randint(vocabulary, (batch, length), device=device)


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, vocabulary] of a prefill and two decoded tokens."""
    peers.forget(model)
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :-2], ids[:, -2:-1], ids[:, -1:]]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@torch.no_grad()
def check(
    bare: nn.Module, patched: nn.Module, exact: nn.Module, ids: torch.Tensor
) -> tuple[str, float, float, torch.Tensor | None]:
    """Compare a patched model with its backbone, the memory disabled, and with the reference.

    Args:
        bare: the backbone.
        patched: the same one, patched.
        exact: the same one in float32 with the same adapter, computed by the reference.
        ids: tokens [B, T] to compare the logits of.

    Rounding to 16 bits moves the logits of a deep random model by some percent, memory or none. So what the
    memory may add to that is measured against what the backbone has of it.

    Returns:
        what is wrong with the patched model, or ""; the relative error of its logits, the error allowed, and the
        logits that the reference gives (None: not asked).
    """
    plain = logits_of(bare, ids)
    with memory_disabled(patched):
        if not torch.equal(logits_of(patched, ids), plain):
            return "logits differ from the backbone's with the memory disabled", float("nan"), 0.0, None
    with memory_disabled(exact):
        noise = relative_error(plain, logits_of(exact, ids))
    logits, wanted = logits_of(patched, ids), logits_of(exact, ids)
    error, budget = relative_error(logits, wanted), max(TOLERANCE, NOISE * noise)
    wrong = "" if error < budget else f"relative error {error:.1e} of the logits, allowed under {budget:.0e}"
    if not relative_error(wanted, plain) > 2 * budget:
        wrong = "the adapter changes too little to be checked"
    return wrong, error, budget, wanted


@torch.no_grad()
def loud(model: nn.Module) -> nn.Module:
    """Random corrections as large as what they correct, so that an error in them shows; returns the model."""
    for module in model.modules():
        if hasattr(module, "delta_memory"):
            memory = module.delta_memory
            for head in memory.config.delta_heads:
                getattr(memory, f"delta_{head}_proj").normal_(std=0.5)
    return model


def make(name: str, device: str, dtype: str = "float32", tiny: bool = False, peer: bool = True) -> Models:
    """Build a backbone's variants and check them against each other; see ``check``.

    Args:
        name: of ``backbones.KINDS``.
        device, dtype: of the models.
        tiny: the kind, made small.
        peer: the released memory too.
    """
    config = backbones.configuration(name, tiny)
    bare = backbones.build(config, getattr(torch, dtype), device)
    count = sum(parameter.numel() for parameter in bare.parameters())
    patched = loud(patch_model(copy.deepcopy(bare), DeltaMemConfig()))
    exact = patch_model(copy.deepcopy(bare).float(), DeltaMemConfig(), backend="reference")
    exact.load_state_dict(patched.state_dict())
    models = Models(f"tiny {name}" if tiny else name, dtype, device, {"unpatched": bare}, count=count)
    ids = random_ids(config.vocab_size, 2, 26, device)
    wrong, error, budget, wanted = check(bare, patched, exact, ids)
    del exact
    if wrong:
        models.refusals["patched"] = refused("", {}, wrong, error)
    else:
        models.variants["patched"], models.errors["patched"] = patched, error
    if peer:
        _add_released(models, bare, patched, ids, 2 * budget, wanted)
    for variant in models.variants.values():
        _share(bare, variant)
    return models


def _share(bare: nn.Module, variant: nn.Module) -> None:
    """What lies outside of attention is one memory from now on.

    The same matmul takes up to a tenth longer or shorter by where its weights happen to lie; that is no variant's.
    """
    own = dict(bare.named_parameters())
    for name, parameter in variant.named_parameters():
        if ".self_attn." not in name and name in own:
            parameter.data = own[name].data


@torch.no_grad()
def _add_released(
    models: Models, bare: nn.Module, patched: nn.Module, ids: torch.Tensor, budget: float, wanted: torch.Tensor | None
) -> None:
    try:
        model = peers.released_model(bare, patched)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # it knows Qwen3 and SmolLM3 alone
        models.refusals["released"] = absent("", f"the released package takes no {type(bare).__name__}: {error}")
        return
    if model is None:
        models.refusals["released"] = absent("", peers.MISSING["released"])
        return
    # Its state is rounded to the model's dtype at each call, which its own error shows.
    error = float("nan") if wanted is None else relative_error(logits_of(model, ids), wanted)
    if error < budget:
        models.variants["released"], models.errors["released"] = model, error
    else:
        note = f"relative error {error:.1e} of the logits to the reference, allowed under {budget:.0e}"
        models.refusals["released"] = refused("", {}, note, error)


def turn(variants: list[tuple[str, nn.Module]], ids: torch.Tensor, prefill: int, device: str) -> dict:
    """Seconds by phase and variant of a prefill and of the decode after it, the likeliest token fed next.

    The variants read the prompt once and decode a few tokens each, in turns, so that what else the machine does meets
    all of them; every other time in the opposite order. A prefill's seconds are the mean over several.
    """
    states, times = {}, {phase: {name: 0.0 for name, _ in variants} for phase in PHASES}

    def decode(name: str, step: Callable, count: int) -> None:
        for _ in range(count):
            states[name] = step(states[name]).logits.argmax(-1)

    steps = {}
    for count in range(PREFILLS):
        for name, model in variants[:: 1 if count % 2 == 0 else -1]:
            peers.forget(model)
            # As generate does: the logits of the last token only.
            step = functools.partial(model, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
            steps[name], states[name] = step, ids[:, :prefill]
            times["prefill"][name] += wall(functools.partial(decode, name, step, 1), device) / PREFILLS
    # On a GPU all tokens at once: to wait for it after each block would cost more than what it shares out.
    block = BLOCK if device == "cpu" else max(ids.shape[1] - prefill, 1)
    for first in range(prefill, ids.shape[1], block):
        count = min(block, ids.shape[1] - first)
        for name, step in list(steps.items())[:: 1 if (first - prefill) // block % 2 == 0 else -1]:
            times["decode"][name] += wall(functools.partial(decode, name, step, count), device)
    return times


@torch.no_grad()
def measure(models: Models, sizes: Sizes, batch: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by phase and variant, one entry a turn: the models run in turns on the same tokens."""
    variants, length = list(models.variants.items()), sizes.prefill + sizes.decode
    times = {phase: {name: [] for name in models.variants} for phase in PHASES}
    turn(variants, models.ids(batch, length), sizes.prefill, models.device)  # warm-up
    least, most = sizes.turns
    start = time.perf_counter()
    for count in itertools.count():
        if count >= most or (count >= least and time.perf_counter() - start > sizes.budget):
            return times
        # Who goes first changes from turn to turn, so that neither always follows the other.
        found = turn(variants[:: (1, -1)[count % 2]], models.ids(batch, length), sizes.prefill, models.device)
        for phase, name in itertools.product(PHASES, models.variants):
            times[phase][name].append(found[phase][name])


def eager_rows(models: Models, sizes: Sizes, batch: int) -> list[Row]:
    """Rows of prefill and decode at one batch size."""
    times = measure(models, sizes, batch)
    rows = models.rows("prefill", models.parameters(batch=batch, tokens=sizes.prefill), times["prefill"])
    decode = models.parameters(mode="eager", batch=batch, context=sizes.prefill, tokens=sizes.decode)
    return rows + models.rows("decode", decode, times["decode"])


def prefill(model: nn.Module, ids: torch.Tensor) -> None:
    """One forward of a whole prompt, logits of the last token only."""
    peers.forget(model)
    model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)


@torch.no_grad()
def prefill_rows(models: Models, length: int, turns: int) -> list[Row]:
    """Rows of a long prompt, one row of it: seconds, ``peak_memory`` and, where patched, ``extra_memory``.

    ``peak_memory`` is a model's own weights and what a prefill takes at its peak beyond them, in bytes;
    ``extra_memory`` is patched ÷ unpatched − 1.
    """
    peaks = {}
    for name, model in models.variants.items():
        prefill(model, models.ids(1, length))  # kernels compile here
        taken = peak_memory(functools.partial(prefill, model, models.ids(1, length)), models.device)
        if taken is not None:
            peaks[name] = backbones.weight_bytes(model) + taken
    prompts = [models.ids(1, length) for _ in range(turns)]
    calls = {name: lambda n, model=model: prefill(model, prompts[n]) for name, model in models.variants.items()}
    times = in_turns(calls, turns, models.device, warm_up=0, events=False)
    made = models.rows("prefill", models.parameters(batch=1, tokens=length), times)
    for row in made:
        if row.status == "measured" and row.variant in peaks:
            row.values["peak_memory"] = peaks[row.variant]
            if row.variant != "unpatched":
                row.values["extra_memory"] = peaks[row.variant] / peaks["unpatched"] - 1
    return made


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    """All rows of the model benchmark on a CPU."""
    sizes = QUICK if quick else FULL
    rows = []
    for name in SMALL:
        models = make(name, "cpu", tiny=quick)
        progress(f"model: {name}, {models.count:,} parameters")
        for batch in (1, 2) if quick else (1, 4):
            progress(f"model: {name}, batch {batch}")
            rows += eager_rows(models, sizes, batch)
    return rows
