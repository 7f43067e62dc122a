"""``deltamem demo``: the recall proof.

A small backbone that was trained to answer from its context, and adapters trained to remember, are told facts about
names that neither has seen; the context is thrown away; what is answered then comes from the memory. Measured against
an empty memory, and against the bare backbone without, with half of, and with all of the facts in sight.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltamem_kernels.dispatch import check_backend, installed, resolve_backend

from ..adapter.files import same_bits
from ..adapter.record import identity_of, memory_disabled
from ..arguments import check_choice
from ..display import counted
from ..errors import ArgumentError
from ..inspection.facts import versions
from ..inspection.pictures import Snapshot, draw_heat_map
from ..memory.figures import norm_of
from ..memory.state import MemoryState
from ..model.loading import device_for
from ..model.patch import patch_model, unpatch_model
from ..model.threads import check_threads, fitting_threads
from . import proof
from .chats import next_logits
from .task import user
from .weights import STRATEGIES, find_weights, load_backbone

MEMORY_NAME, HEAT_MAP_NAME = "memory.safetensors", "heatmap.png"

# What has to hold.
FEW_FACTS, RECALL_AT_LEAST = 4, 0.9
ABOVE_CHANCE_AT_MOST = 0.05
HALF_AT_LEAST = 1.31
REVISED_AT_LEAST = 0.8
CHECKS = {
    "recall": f"the best strategy answers at least {RECALL_AT_LEAST:.0%} right at 1 to {FEW_FACTS} facts",
    "empty_near_chance": f"an empty memory is at most {ABOVE_CHANCE_AT_MOST:.0%} above chance",
    "frozen_near_chance": f"the bare backbone, which sees nothing, is at most {ABOVE_CHANCE_AT_MOST:.0%} above chance",
    "half_in_sight": f"with half of the facts in sight the best strategy answers {HALF_AT_LEAST} × as many right",
    "revised": f"after a revision it answers at least {REVISED_AT_LEAST:.0%} right, of new values and others",
    "memory_finite": "the memory is finite, and no token was left out of it",
    "saved_equals_loaded": "the loaded memory is the saved one and gives the same logits, bit for bit",
    "disabled_bit_identical": "under memory_disabled the logits are those from before patching, bit for bit",
    "unpatched_bit_identical": "after unpatch_model logits and weights are those from before patching, bit for bit",
}


@torch.no_grad()
def run_demo(
    *,
    weights: str | os.PathLike | None = None,
    strategy: str = "msw",
    seed: int = 0,
    questions: int = 256,
    output: str | os.PathLike = "demo-output",
    backend: str = "auto",
    threads: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], list[Snapshot]]:
    """Run the proof.

    Args:
        weights: a directory with the backbone and its adapters; None = the shipped ones.
        strategy: which adapter tells the story, ``tsw``, ``ssw`` or ``msw``; all of them are measured.
        seed: of names, facts and sentences. The same seed gives the same figures, ``timings`` apart.
        questions: asked at each number of facts, or a few more (whole episodes).
        output: a directory for ``memory.safetensors`` and ``heatmap.png``, made if needed.
        backend: as in ``patch_model``. The model is on a GPU if there is one and the backend runs there.
        threads: of PyTorch on a CPU; None = one, which fits so small a model (``fitting_threads``).
        say: told what is being done.

    Returns:
        The figures, ready for JSON, and the states of the story's memory as it fills; ``format_demo`` makes text of
        both. In the figures ``recall`` is {strategy: {facts: accuracy}}; ``empty``, ``frozen`` and ``context`` are
        {facts: accuracy}, with facts as text. An empty memory is measured under ``strategy`` alone: it reads zeros
        under each.

    Raises:
        ValueError: an argument out of range, broken weights, or a backend that cannot run here.
        FileNotFoundError: weights are missing.
    """
    started = time.perf_counter()
    check_choice(strategy, "strategy", STRATEGIES)
    if questions < 1:
        raise ArgumentError(f"questions: got {questions}, allowed 1 or more")
    check_backend(backend)
    check_threads(threads, "threads")
    device = device_for(backend)
    found = find_weights(weights)
    plan = proof.draw_plan(seed, questions)
    say("loading the backbone")
    model, tokenizer = load_backbone(found.backbone, device)
    with fitting_threads(model, threads):
        bare = Bare.of(model, tokenizer, plan.story)
        figures = proof.measure_bare(model, tokenizer, plan, say)
        disabled, unpatched = [], []
        for name, directory in found.adapters.items():
            patch_model(model, directory, backend=backend)
            for key, value in proof.measure_patched(model, tokenizer, plan, name, say).items():
                figures.setdefault(key, {})[name] = value
            disabled.append(bare.same_disabled(model, tokenizer, plan.story))
            if name == strategy:
                figures["empty"] = proof.measure_recall(model, tokenizer, plan, "empty", "empty memory", say)
                told, snapshots, held = _tell_story(model, tokenizer, plan.story, Path(output), bare.answers)
                figures |= told | _sizes(model)
            unpatch_model(model)
            unpatched.append(bare.same(model, tokenizer, plan.story))
        threads_here = counted(torch.get_num_threads(), "thread")
        figures |= {
            "strategy": strategy,
            "seed": seed,
            "questions": questions,
            "backend": resolve_backend(backend, device.type),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads_here}",
            "versions": versions(),
        }
    held |= {"disabled_bit_identical": all(disabled), "unpatched_bit_identical": all(unpatched)}
    return _finished(figures, held, started), snapshots


def _finished(figures: dict[str, Any], held: dict[str, bool], started: float) -> dict[str, Any]:
    """The figures, the promised ones first, with the checks."""
    figures |= {"best": best_strategy(figures), "chance": proof.chance()}
    figures["half_ratio"] = {name: half_ratio(figures, name) for name in figures["half"]}
    checks = check_figures(figures) | held
    first = ("recall", "empty", "frozen", "context", "chance", "half", "half_frozen", "half_ratio", "revise")
    return (
        {key: figures[key] for key in first}
        | figures
        | {"checks": {name: checks[name] for name in CHECKS}}
        | {"timings": {"seconds": time.perf_counter() - started}}
    )


def best_strategy(figures: dict[str, Any]) -> str:
    """The strategy that recalls most at few facts."""
    return max(figures["recall"], key=lambda name: sum(_at_few_facts(figures["recall"][name])))


def check_figures(figures: dict[str, Any]) -> dict[str, bool]:
    """Whether the measured figures are what the proof claims."""
    best = figures["best"]
    most = figures["chance"] + ABOVE_CHANCE_AT_MOST
    return {
        "recall": min(_at_few_facts(figures["recall"][best])) >= RECALL_AT_LEAST,
        "empty_near_chance": proof.mean_share(figures["empty"]) <= most,
        "frozen_near_chance": proof.mean_share(figures["frozen"]) <= most,
        "half_in_sight": half_ratio(figures, best) >= HALF_AT_LEAST,
        "revised": min(figures["revise"][best]["revised"], figures["revise"][best]["kept"]) >= REVISED_AT_LEAST,
    }


def half_ratio(figures: dict[str, Any], strategy: str) -> float:
    """With the newer half of the facts in sight: right answers with the memory of the others, over those without."""
    # A backbone that answers nothing right is beaten without bound; JSON knows no infinity.
    return proof.mean_share(figures["half"][strategy]) / max(proof.mean_share(figures["half_frozen"]), 1e-6)


def _at_few_facts(shares: dict[str, float]) -> list[float]:
    return [share for count, share in shares.items() if int(count) <= FEW_FACTS]


def failed_checks(figures: dict[str, Any]) -> list[str]:
    """What did not hold, in words."""
    return [CHECKS[name] for name, holds in figures["checks"].items() if not holds]


# --- the story


@dataclass(frozen=True)
class Bare:
    """The backbone before it is patched: its logits for the story's questions, its weights, what it answers."""

    logits: torch.Tensor
    weights: dict[str, torch.Tensor]
    answers: list[str]

    @classmethod
    def of(cls, model: nn.Module, tokenizer, story: proof.Story) -> Bare:
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        return cls(_logits(model, tokenizer, story), weights, proof.answers_to(model, tokenizer, story))

    def same_disabled(self, model: nn.Module, tokenizer, story: proof.Story) -> bool:
        """Whether a patched model gives the same logits while its memory is disabled, bit for bit."""
        with memory_disabled(model):
            return same_bits(self.logits, _logits(model, tokenizer, story))

    def same(self, model: nn.Module, tokenizer, story: proof.Story) -> bool:
        """Whether an unpatched model has the same weights and gives the same logits, bit for bit."""
        now = model.state_dict()
        same = list(now) == list(self.weights) and all(same_bits(now[key], self.weights[key]) for key in now)
        return same and same_bits(self.logits, _logits(model, tokenizer, story))


def _logits(model: nn.Module, tokenizer, story: proof.Story, memory: MemoryState | None = None) -> torch.Tensor:
    """float32 [questions, vocabulary], of the first token of each answer."""
    memory = None if memory is None else memory.repeat(len(story.facts))
    return next_logits(model, tokenizer, [[user(question)] for question in story.questions], memory)


def _tell_story(
    model: nn.Module, tokenizer, story: proof.Story, output: Path, unpatched: Sequence[str]
) -> tuple[dict[str, Any], list[Snapshot], dict[str, bool]]:
    """Told, asked, revised, asked again, saved and loaded: its figures, the states, and what a memory promises."""
    memory, snapshots = proof.tell_facts(model, tokenizer, story)
    first = proof.answers_to(model, tokenizer, story, memory)
    empty = proof.answers_to(model, tokenizer, story, MemoryState.zeros(model))
    snapshots.append(proof.tell_revision(model, tokenizer, story, memory))
    second = proof.answers_to(model, tokenizer, story, memory)
    path = memory.save(output / MEMORY_NAME)
    loaded = MemoryState.load(path, model)
    picture = draw_heat_map(snapshots, output / HEAT_MAP_NAME) if installed("matplotlib") else None
    figures = {
        "story": {
            "told": [fact.statement() for fact in story.facts],
            "asked": _asked(story.questions, story.facts, memory=first, empty=empty, unpatched=unpatched),
            "revision": story.revised.update(),
            "asked_again": _asked(story.questions, story.holds, memory=second),
        },
        "state_norm": {shot.name: norm_of(shot.states) for shot in snapshots},
        "files": {"memory": str(path), "heat_map": picture and str(picture)},
    }
    logits = [_logits(model, tokenizer, story, which) for which in (memory, loaded)]
    same_memory = list(memory) == list(loaded) and all(same_bits(memory[i], loaded[i]) for i in memory)
    same_memory = same_memory and torch.equal(memory.skipped, loaded.skipped)
    promises = {
        "memory_finite": all(bool(s.isfinite().all()) for _, s in memory.items()) and not bool(memory.skipped.any()),
        "saved_equals_loaded": same_memory and same_bits(*logits),
    }
    return figures, snapshots, promises


def _asked(questions, facts, **answers: Sequence[str]) -> list[dict[str, str]]:
    """One row a question: ``question``, ``truth``, and what was answered under each memory."""
    return [
        {"question": question, "truth": fact.value} | {name: texts[row] for name, texts in answers.items()}
        for row, (question, fact) in enumerate(zip(questions, facts))
    ]


def _sizes(model: nn.Module) -> dict[str, Any]:
    """Backbone, adapter and memory of a patched model."""
    config, identity = model.config, identity_of(model)
    memories = [p for memory in identity.memories.values() for p in memory.parameters()]
    return {
        "backbone": {
            "name": type(model).__name__.removesuffix("ForCausalLM"),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "parameters": sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in memories),
        },
        "adapter": {
            "rank": identity.config.rank,
            "heads": identity.config.num_state_heads,
            "corrects": list(identity.config.delta_heads),
            "parameters": sum(p.numel() for p in memories if p.requires_grad),
        },
        "memory_bytes": sum(state.nbytes for _, state in MemoryState.zeros(model).items()),
    }
