"""Adapters of the recall proof: trained on a frozen backbone to answer from memory what no context shows.

An episode tells facts (some overwritten later, small talk between them) and asks for some of them, each in a context of
its own. In a fifth of the episodes the newer half of the facts stays visible; one read part in twenty is small talk,
whose answer must stay what the backbone says. The loss is ``deltamem_fast.training.episode_loss``; the last steps add
that of ``settle.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_fast import DeltaMemConfig, patch_model, save_adapter
from deltamem_fast.recall import task
from deltamem_fast.recall.chats import Chat, encode
from deltamem_fast.storage.files import write_json
from deltamem_fast.training import EpisodeBatch, episode_loss
from deltamem_fast.training.setup import prepare_for_training

from . import checkpoint
from .settle import settling_losses

IGNORED = -100
STRATEGIES = ("tsw", "ssw", "msw")
_FIGURES = (("answer_loss", "losses"), ("text_divergence", "divergences"))  # in training.json, the last steps' mean


@dataclass(frozen=True)
class AdapterOptions:
    """How an adapter is trained.

    Attributes:
        strategy: ``tsw``, ``ssw`` (a write per sentence) or ``msw`` (four states).
        rank: r.
        steps: of the optimizer.
        rows, questions: conversations a step, and read parts of each.
        most_facts: of a conversation; the first steps have fewer.
        lr: of AdamW, cosine to a twentieth.
        settle_steps, settle_lr, settle_weight: steps after that, with an optimizer of their own, their learning rate,
            and the weight of the divergence (``settle.py``).
        seed: of weights and data.
        save_every: steps between checkpoints.
    """

    strategy: str = "tsw"
    rank: int = 8
    steps: int = 2000
    rows: int = 32
    questions: int = 4
    most_facts: int = 8
    lr: float = 3e-3
    settle_steps: int = 500
    settle_lr: float = 1.5e-3
    settle_weight: float = 10.0
    seed: int = 0
    save_every: int = 100

    def config(self) -> DeltaMemConfig:
        """The adapter's configuration: the released recipe, of this strategy and rank."""
        changes = {"rank": self.rank, "base_slice_ref_width": self.rank, "alpha": 2.0 * self.rank}
        if self.strategy == "ssw":
            return DeltaMemConfig.ssw("sentence_mean", **changes)
        return DeltaMemConfig.preset(self.strategy, **changes)


class Episodes:
    """Batches of episodes, drawn without end."""

    def __init__(self, tokenizer, options: AdapterOptions, random: Random):
        self.tokenizer, self.options, self.random = tokenizer, options, random
        self.segmented = options.config().segmented

    def _episode(self, most_facts: int, half: bool) -> tuple[Chat, list[Chat]]:
        """What is told, and the read parts, each ending with its answer."""
        random = self.random
        facts = task.draw_facts(random, random.randint(1, most_facts), held_out=False)
        visible: list[dict[str, str]] = []
        seen: list[task.Fact] = []
        if half and len(facts) > 1:
            facts, seen = facts[: len(facts) - len(facts) // 2], facts[len(facts) - len(facts) // 2 :]
            visible = task.grouped(random, [fact.statement(random) for fact in seen], 4)
        told, holds = task.telling(random, facts, held_out=False, distractors=0.2, updates=0.1)
        reads = []
        for _ in range(self.options.questions):
            if random.random() < 0.05:
                reads.append(task.small_talk(random, held_out=False, most=1))
            else:
                reads.append([*visible, *task.asking(random, [random.choice([*holds, *seen])])])
        return told, reads

    def batch(self, done: float) -> EpisodeBatch:
        """The next batch, ``done`` (0 to 1) into the run."""
        most = min(self.options.most_facts, 2 if done < 0.15 else 4 if done < 0.4 else self.options.most_facts)
        drawn = [self._episode(most, done > 0.3 and self.random.random() < 0.2) for _ in range(self.options.rows)]
        written = encode(self.tokenizer, [told for told, _ in drawn])
        read = encode(self.tokenizer, [chat for _, reads in drawn for chat in reads])
        answers = read.segment_ids == read.segment_ids.amax(1, keepdim=True)
        # The answer is the last sentence without the role's mark. Its end is learnt too, or generate would not stop.
        marks = torch.tensor([i for i in self.tokenizer.all_special_ids if i != self.tokenizer.eos_token_id])
        labels = torch.where(answers & ~torch.isin(read.input_ids, marks), read.input_ids, IGNORED)
        return EpisodeBatch(
            written.input_ids, written.attention_mask.bool(), read.input_ids, read.attention_mask.bool(), labels,
            written.segment_ids if self.segmented else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """One part of a run: its steps, learning rate and random numbers, and losses(done) → (to minimise, figures)."""

    name: str
    steps: int
    lr: float
    random: Random
    losses: Callable[[float], tuple[torch.Tensor, dict[str, float]]]


def _phases(model: nn.Module, tokenizer, options: AdapterOptions, device: str) -> list[Phase]:
    answers, settling = Random(options.seed + 1), Random(options.seed + 2)
    episodes, more = (Episodes(tokenizer, options, random) for random in (answers, settling))

    def answer_loss(done: float):
        with torch.autocast(device, torch.bfloat16):
            found = episode_loss(model, episodes.batch(done).to(device))
        return found.loss, {"losses": found.answer_loss.item()}

    def settling_loss(done: float):
        with torch.autocast(device, torch.bfloat16):
            answer, divergence = settling_losses(model, tokenizer, more.batch(1.0).to(device), settling)
        loss = answer + options.settle_weight * divergence
        return loss, {"losses": answer.item(), "divergences": divergence.item()}

    return [
        Phase("answers", options.steps, options.lr, answers, answer_loss),
        Phase("settling", options.settle_steps, options.settle_lr, settling, settling_loss),
    ]


def _advance(phase: Phase, optimizer: torch.optim.Optimizer, place: dict) -> None:
    """One step; ``place`` is moved on."""
    started = time.perf_counter()
    done = place["step"] / phase.steps
    for group in optimizer.param_groups:
        warm_up = min(1.0, (place["step"] + 1) / 50)
        group["lr"] = phase.lr * warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
    loss, figures = phase.losses(done)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    for name, value in figures.items():
        place[name].append(value)
    place["step"] += 1
    place["seconds"] += time.perf_counter() - started


def train_adapter(
    options: AdapterOptions,
    backbone: Path,
    output: Path,
    device: str = "cpu",
    report: Callable[[nn.Module, object], dict] = lambda model, tokenizer: {},
) -> dict:
    """Train, or go on with, one adapter of the backbone in ``backbone`` and write it into ``output``.

    Args:
        report: called with the trained model and its tokenizer; what it returns joins the figures.

    Returns:
        The run's figures, as ``output/training.json`` holds them.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    # Contexts are short, and eager attention's gradient is the fastest then.
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32, attn_implementation="eager").to(device)
    torch.manual_seed(options.seed)
    patch_model(model, options.config())
    prepare_for_training(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    place = {"phase": 0, "step": 0, "losses": [], "divergences": [], "seconds": 0.0}
    saved = checkpoint.load(output, asdict(options), device)
    if saved is not None:
        place = dict(saved["place"])
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved["model"][name])
    for number, phase in enumerate(_phases(model, tokenizer, options, device)):
        if number < place["phase"]:
            continue
        if number > place["phase"]:
            place |= {"phase": number, "step": 0}
        optimizer = torch.optim.AdamW(trained.values(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.0)
        if saved is not None and saved["place"]["phase"] == number:
            checkpoint.restore(saved, optimizer, phase.random)
        with tqdm(total=phase.steps, initial=place["step"], desc=f"{output.name}, {phase.name}", unit="step") as bar:
            while place["step"] < phase.steps:
                _advance(phase, optimizer, place)
                recent = place["losses"][-20:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
                bar.update()
                if place["step"] % options.save_every == 0:
                    checkpoint.save(output, asdict(options), trained, optimizer, phase.random, **place)
    model.eval()
    save_adapter(model, output)
    figures = {
        "options": asdict(options), "seconds": round(place["seconds"], 1),
        "parameters": sum(p.numel() for p in trained.values()),
        **{name: sum(place[key][-50:]) / max(1, len(place[key][-50:])) for name, key in _FIGURES},
        **report(model, tokenizer),
    }  # fmt: skip
    write_json(output / "training.json", figures, private=False)
    checkpoint.remove(output)
    return figures
