"""The last stage of an adapter's training: what it was told is to last while others talk.

A settled adapter writes a little at every token: after a thousand tokens of talk a tenth of the facts' state is left
(``python -m bench.recall fading``). So it is trained on, with two things more. Episodes have up to a thousand tokens
that state no fact. And β at those tokens costs: a row of the state decays by Π(1 − β), so by the sum of β over 1,024 of
them, in nats. Of each gate's decay d the mean of log(1 + 10 d) is charged: each e-fold less costs as much as the one
before, down to a tenth of a nat; charged in proportion, a gate that lets a fact fade in 1,024 tokens would cost next to
nothing. The loss of the answers and the divergence on ordinary text stay as in settle.py.

python -m examples.recall.lasting --adapter deltamem_fast/data/recall/tsw-r8 --output build/lasting/tsw-r8
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import BatchEncoding, get_cosine_schedule_with_warmup

from deltamem_fast import patch_model, save_adapter
from deltamem_fast.adapter.record import identity_of, record_of
from deltamem_fast.recall.chats import encode
from deltamem_fast.recall.weights import SHIPPED, load_backbone
from deltamem_fast.storage.files import write_json
from deltamem_fast.training import EpisodeBatch
from deltamem_fast.training.loss import IGNORED, answer_losses, write_memory
from deltamem_fast.training.setup import prepare_for_training

from .settle import draw_text, text_divergence
from .talking import LongEpisode, draw_long_episode

SPAN = 1024  # tokens of talk over which decay is charged
SMALL = 0.1  # nats; a decay under this costs little more the larger it is
# (share of the steps, rows of a step, least and most tokens of talk): about as many tokens each.
LENGTHS = ((0.5, 24, 0, 120), (0.3, 10, 120, 400), (0.2, 5, 600, 1100))


@dataclass(frozen=True)
class LastingOptions:
    """How an adapter is made to last.

    Attributes:
        steps: of the optimizer; episodes are fresh in each.
        lr: peak, of AdamW; cosine to 0, a tenth warm-up.
        most_facts: of an episode; each is asked ``questions`` questions.
        gate_weight: of what the gates cost on talk (``talk_decay``); 0 = nothing.
        divergence_weight: of the KL on ordinary text.
        long: episodes as long as ``LENGTHS`` says; False = the shortest kind alone.
        seed: of the episodes.
        rows: times as many episodes a step as ``LENGTHS`` says.
        revisions: share of the facts behind which one is overwritten (``draw_long_episode``).
        about_revised: share of the questions that ask for an overwritten fact.
    """

    steps: int = 450
    lr: float = 1.5e-3
    most_facts: int = 8
    questions: int = 4
    gate_weight: float = 0.1
    divergence_weight: float = 10.0
    long: bool = True
    seed: int = 0
    rows: int = 1
    revisions: float = 0.1
    about_revised: float = 0.0


@contextlib.contextmanager
def recorded_inputs(model: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Inside, the last forward's input of each attention, [B, T, hidden], on the graph, by layer index."""
    found: dict[int, torch.Tensor] = {}

    def keep(attention, arguments, keywords):
        found[attention.delta_memory.layer_idx] = keywords["hidden_states"] if not arguments else arguments[0]

    attentions = record_of(model).attentions.values()
    handles = [attention.register_forward_pre_hook(keep, with_kwargs=True) for attention in attentions]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def talk_decay(
    model: nn.Module, inputs: dict[int, torch.Tensor], talk: torch.Tensor, segments: torch.Tensor | None
) -> torch.Tensor:
    """Nats by which ``SPAN`` tokens of talk shrink each row of the states: Σ β; float32 [layers, gates] on the graph.

    Args:
        inputs: of the write pass, by layer.
        talk: bool [B, T], True = a token that states no fact; one at least.
        segments: int64 [B, T] (SSW): a segment writes once, with the gates of its mean; None = each token writes.
    """
    found = []
    for attention in record_of(model).attentions.values():
        layer = attention.delta_memory
        hidden, writes = inputs[layer.layer_idx], talk
        if segments is not None:
            hidden, writes = _segment_means(hidden, segments, talk)
        beta = torch.sigmoid(hidden[writes].float() @ layer.beta_proj.float().t() + layer.beta_bias.float())
        found.append(beta.sum(0) * (SPAN / talk.sum()))
    return torch.stack(found)


def gate_cost(decay: torch.Tensor) -> torch.Tensor:
    """Mean of log(1 + d / ``SMALL``) over all gates, a scalar."""
    return torch.log1p(decay / SMALL).mean()


def _segment_means(
    hidden: torch.Tensor, segments: torch.Tensor, talk: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over each row's segments, [B, N, hidden], and which of them are talk, bool [B, N]."""
    count = int(segments.max()) + 1
    one_hot = (segments[..., None] == torch.arange(count, device=segments.device)).float()  # [B, T, N]
    sizes = one_hot.sum(1)
    means = one_hot.transpose(1, 2) @ hidden.float() / sizes.clamp(min=1)[..., None]
    return means, (one_hot * talk[..., None]).sum(1).gt(0) & sizes.gt(0)


def make_batch(tokenizer, episodes: list[LongEpisode], segmented: bool) -> tuple[EpisodeBatch, torch.Tensor]:
    """The episodes as tensors, and which written tokens state no fact, bool [B, Tw].

    Raises:
        ValueError: an episode's sentences are not those that its messages are cut into.
    """
    told = encode(tokenizer, [episode.told for episode in episodes])
    segments, written = told.segment_ids, told.attention_mask.bool()
    states = torch.zeros(len(episodes), int(segments.max()) + 1, dtype=torch.bool, device="cpu")
    for row, episode in enumerate(episodes):
        if int(segments[row].max()) + 1 != len(episode.states):
            raise ValueError(f"episodes: row {row} has {len(episode.states)} sentences, and is cut into others")
        states[row, : len(episode.states)] = torch.tensor(episode.states, device="cpu")
    talk = written & ~states.gather(1, segments.clamp(min=0))
    asked = encode(tokenizer, [chat for episode in episodes for chat in episode.asked])
    lengths = asked.attention_mask.sum(1, keepdim=True)
    place = torch.arange(asked.input_ids.shape[1], device="cpu")
    answer = (place >= lengths - 2) & (place < lengths)  # the value, one token, and the end of the turn
    labels = torch.where(answer, asked.input_ids, IGNORED)
    return EpisodeBatch(
        told.input_ids, written, asked.input_ids, asked.attention_mask.bool(), labels, segments if segmented else None
    ), talk


@dataclass(frozen=True)
class Step:
    """What a step needs: episodes, which of the written tokens state no fact, bool [B, Tw], and ordinary texts."""

    episodes: EpisodeBatch
    talk: torch.Tensor
    texts: BatchEncoding


class Steps(Dataset[Step]):
    """The steps of a run, each of which depends on the options and its place alone."""

    def __init__(self, tokenizer, options: LastingOptions, segmented: bool):
        self._tokenizer, self._options, self._segmented = tokenizer, options, segmented

    def __len__(self) -> int:
        return self._options.steps

    def __getitem__(self, place: int) -> Step:
        options = self._options
        random = Random(f"lasting {options.seed} {place}")
        lengths = LENGTHS if options.long else LENGTHS[:1]
        _, rows, least, most = random.choices(lengths, [share for share, *_ in lengths])[0]
        episodes = [
            draw_long_episode(
                random,
                options.most_facts,
                random.randint(least, most),
                options.questions,
                options.revisions,
                options.about_revised,
            )
            for _ in range(rows * options.rows)
        ]
        texts = encode(self._tokenizer, [draw_text(random) for _ in episodes])
        return Step(*make_batch(self._tokenizer, episodes, self._segmented), texts)


def lasting_losses(model: nn.Module, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers, the divergence on ordinary text, and ``talk_decay`` (zeros without talk)."""
    device = next(model.parameters()).device
    batch, talk = step.episodes.to(device), step.talk.to(device)
    with recorded_inputs(model) as inputs:
        memory = write_memory(model, batch)
        decay = talk_decay(model, inputs, talk, batch.segment_ids) if talk.any() else torch.zeros(1, 1, device=device)
    losses, tokens = answer_losses(model, batch, memory)
    return losses.sum() / tokens.sum(), text_divergence(model, step.texts, memory), decay


def make_lasting(model: nn.Module, tokenizer, options: LastingOptions) -> dict[str, float]:
    """Train a patched model's adapter on; returns the last 50 steps' means of the three losses, and the seconds."""
    prepare_for_training(model)
    started = time.perf_counter()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    found = []
    # Drawing a step takes as long as a GPU needs for one.
    workers = 2 if next(model.parameters()).is_cuda else 0
    steps = Steps(tokenizer, options, identity_of(model).config.segmented)
    for step in (bar := tqdm(DataLoader(steps, None, num_workers=workers), "lasting", unit="step", mininterval=5)):
        answer, divergence, decay = lasting_losses(model, step)
        optimizer.zero_grad()
        (answer + options.divergence_weight * divergence + options.gate_weight * gate_cost(decay)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        found.append([answer.item(), divergence.item(), decay.mean().item()])
        recent = torch.tensor(found[-20:]).mean(0).tolist()
        bar.set_postfix_str("answer {:.3f}, divergence {:.4f}, decay {:.2f}".format(*recent), refresh=False)
    model.eval()
    means = dict(zip(("answer_loss", "text_divergence", "talk_decay"), torch.tensor(found[-50:]).mean(0).tolist()))
    return means | {"seconds": round(time.perf_counter() - started, 1)}


def main(arguments: list[str] | None = None) -> int:
    """Train one adapter on and write it; returns the exit status."""
    parser = argparse.ArgumentParser("python -m examples.recall.lasting", description="Train an adapter on: to last.")
    parser.add_argument("--adapter", type=Path, required=True, help="its directory")
    parser.add_argument("--backbone", type=Path, default=SHIPPED / "backbone", help="default: the shipped one")
    parser.add_argument("--output", type=Path, required=True, help="for the adapter and training.json")
    defaults = LastingOptions()
    for name in ("steps", "seed", "most_facts", "rows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in ("lr", "gate_weight", "divergence_weight", "revisions", "about_revised"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    parser.add_argument("--short", action="store_true", help="no long episodes")
    given = parser.parse_args(arguments)
    options = LastingOptions(
        given.steps, given.lr, given.most_facts, defaults.questions, given.gate_weight, given.divergence_weight,
        not given.short, given.seed, given.rows, given.revisions, given.about_revised,
    )  # fmt: skip
    for name in ("steps", "rows", "most_facts"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(given, name)}, allowed 1 or more")
    for name in ("revisions", "about_revised"):
        if not 0 <= getattr(given, name) <= 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(given, name)}, allowed 0 to 1")
    from .adapters import check

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_backbone(given.backbone, device)
    patch_model(model, given.adapter)
    found = make_lasting(model, tokenizer, options)
    save_adapter(model, given.output)
    figures = {"lasting": {"options": asdict(options), **found}, "recall": check(model, tokenizer)}
    write_json(given.output / "training.json", figures, private=False)
    print(figures["recall"], file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
