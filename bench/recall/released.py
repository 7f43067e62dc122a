"""Recall of one adapter under the released code and under this: told whole, in chunks on a warm cache, in padded rows.

The adapter of the recall proof is exported to the released format and loaded by the released package; both are told
the same conversations. ``DELTAMEM_RELEASED`` names the folder that holds the package ``deltamem``.

The released memory reads off the attention's mask which tokens are real. Eager attention adds its mask to the scores,
0 where a token may be seen; SDPA's is boolean, True there, which the released code takes for "masked". Where SDPA gets
a mask at all, of a chunk on a filled cache or of a padded batch, no token is then read or written.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import nn

from deltamem_fast import MemoryState, export_adapter, patch_model
from deltamem_fast.model.loading import load_model
from deltamem_fast.recall.chats import encode
from deltamem_fast.recall.task import user
from deltamem_fast.recall.weights import find_weights

from ..instrument import commands, results
from ..instrument.rows import Row, absent, counted
from ..speed import peers
from . import conversations, figures
from .conversations import Conversation

DIRECTORY = results.DIRECTORY / "released"
NAME, STRATEGY, FACTS, EPISODES = "released", "tsw", 4, 48
ATTENTIONS = ("eager", "sdpa")


@dataclass(frozen=True)
class Way:
    """How conversations are told and asked.

    Attributes:
        chunks: in how many pieces, on a warm cache; 0 = of ``tokens`` each.
        rows: conversations of a batch, padded on the right.
    """

    name: str
    chunks: int = 1
    tokens: int = 0
    rows: int = 1

    def pieces(self, length: int) -> list[int]:
        """The lengths of the pieces of so many tokens."""
        size = self.tokens or -(-length // self.chunks)
        return [min(size, length - first) for first in range(0, length, size)]


WAYS = (
    Way("one forward"),
    Way("two chunks", chunks=2),
    Way("chunks of 8 tokens", tokens=8),
    Way("batches of 8, padded", rows=8),
)
# forward(**inputs): the model's own, with its memory; ``write`` = whether that is written.
Forward = Callable[..., torch.Tensor]


@contextlib.contextmanager
def _ours(model: nn.Module, rows: int) -> Iterator[Forward]:
    memory = MemoryState.zeros(model, rows)

    def forward(*, write: bool, **inputs):
        return model(**inputs, memory=memory if write else memory.read_only())

    yield forward


@contextlib.contextmanager
def _theirs(model: nn.Module, rows: int) -> Iterator[Forward]:
    package = peers.released()
    peers.forget(model)

    def forward(*, write: bool, **inputs):
        package.set_delta_mem_write_enabled(model, write)
        return model(**inputs)

    yield forward
    peers.forget(model)


@torch.no_grad()
def answers(model, tokenizer, way: Way, talks: Sequence[Conversation], memory) -> list[list[str]]:
    """What is answered to each conversation's questions, each in a context of its own, in batches as it was told.

    Args:
        memory: ``_ours`` or ``_theirs``.
    """
    found: list[list[str]] = []
    for first in range(0, len(talks), way.rows):
        part = talks[first : first + way.rows]
        with memory(model, len(part)) as forward:
            _tell(forward, encode(tokenizer, [talk.told for talk in part]), way)
            asked = zip(*[talk.questions for talk in part], strict=True)
            texts = [_ask(forward, tokenizer, [[user(q.fact.question())] for q in row]) for row in asked]
        found += [list(column) for column in zip(*texts)]
    return found


def _tell(forward: Forward, batch, way: Way) -> None:
    ids, mask, first, cache = batch.input_ids, batch.attention_mask, 0, None
    for size in way.pieces(ids.shape[1]):
        last = first + size
        inputs = {"input_ids": ids[:, first:last], "attention_mask": mask[:, :last], "past_key_values": cache}
        cache = forward(**inputs, use_cache=True, write=True).past_key_values
        first = last


def _ask(forward: Forward, tokenizer, chats) -> list[str]:
    batch = encode(tokenizer, chats, add_generation_prompt=True)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    logits = forward(**inputs, write=False).logits
    last = batch.attention_mask.sum(1) - 1
    best = logits[torch.arange(len(chats)), last].argmax(-1).tolist()
    return [tokenizer.decode([token]).strip() for token in best]


def _backbone(attention: str):
    weights = find_weights()
    options = {"dtype": "float32", "attention": attention, "local": True, "quiet": True}
    return load_model(str(weights.backbone), "weights", device="cpu", **options)


def _released(attention: str, adapter: str) -> nn.Module:
    """The backbone with the released package's memory, its adapter read by the released package."""
    package = peers.released()
    model, _ = _backbone(attention)
    package.attach_delta_mem(model, package.HFDeltaMemConfig.from_pretrained(adapter))
    package.load_delta_mem_adapter(model, adapter)
    return model.eval()


def measure(episodes: int, progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Recall of both, for each attention and way; of the released code "absent" where it cannot be imported."""
    rows: list[Row] = []
    for attention in ATTENTIONS:
        ours, tokenizer = _backbone(attention)
        patch_model(ours, find_weights().adapters[STRATEGY])
        random = Random(NAME)
        talks = [conversations.plain(random, tokenizer, facts=FACTS) for _ in range(episodes)]
        with tempfile.TemporaryDirectory() as folder:
            adapter = export_adapter(ours, folder, "released")
            theirs = _released(attention, str(adapter)) if peers.released() else None
        for way in WAYS:
            progress(f"{attention}, {way.name}")
            parameters = {"attention": attention, "told": way.name}
            for name, model, memory in (("deltamem-fast", ours, _ours), ("released code", theirs, _theirs)):
                if model is None:
                    rows.append(absent(f"{NAME}/{name}", peers.MISSING["released"], parameters))
                    continue
                given = answers(model, tokenizer, way, talks, memory)
                rows.append(counted(f"{NAME}/{name}", parameters, **figures.point(talks, given)))
    return rows


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.recall released``."""
    parser.add_argument("--episodes", type=int, default=EPISODES, help="conversations (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure and write; a run with fewer conversations is kept out of docs/results."""
    if options.episodes < 1:
        raise ValueError(f"--episodes: got {options.episodes}, allowed 1 or more")
    if peers.released() is None:
        raise FileNotFoundError(f"DELTAMEM_RELEASED: {peers.MISSING['released']}")
    rows = measure(options.episodes, commands.progress())
    arguments = {"quick": options.episodes < EPISODES, "episodes": options.episodes}
    result = results.collect(rows, "cpu", arguments, strategy=STRATEGY)
    for row in rows:
        share = f"{row.values['share']:.3f} ± {row.values['error']:.3f}"
        print(f"{row.parameters['attention']:6} {row.parameters['told']:22} {row.variant:14} {share}")
    print(results.write(options.output, result))
    return 0
