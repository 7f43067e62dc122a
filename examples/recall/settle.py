"""The end of an adapter's training: memory is to speak where it is asked, and to be silent elsewhere.

Trained on answers alone, an adapter that holds facts pulls every sentence towards them. So the last steps also show
ordinary text, read with a memory full of facts about others, and ask for the backbone's own prediction at each of its
tokens: KL(backbone ‖ backbone with memory), beside the loss of the answers. A loss of one's own, in a plain loop.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange
from transformers import BatchEncoding, get_cosine_schedule_with_warmup

from deltamem_fast import DeltaMemConfig, MemoryState, memory_disabled
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.recall import task
from deltamem_fast.recall.chats import Chat, encode
from deltamem_fast.training import EpisodeBatch, EpisodeSchedule, ExampleFiles, build_episode, collate
from deltamem_fast.training.loss import answer_losses, write_memory
from deltamem_fast.training.setup import prepare_for_training

TOKENS = 96  # of a text, which is cut there


@dataclass(frozen=True)
class SettlingOptions:
    """How an adapter is settled: steps, episodes (and texts) of each, peak of the learning rate, weight of the KL."""

    steps: int = 500
    rows: int = 32
    lr: float = 1.5e-3
    weight: float = 10.0
    seed: int = 0


def draw_text(random: Random) -> Chat:
    """A conversation, messages that state facts, or small talk, in equal shares; names of the training texts."""
    return task.text(random, task.TEXTS[random.randrange(3)], held_out=False)


def text_divergence(model: nn.Module, texts: BatchEncoding, memory: MemoryState) -> torch.Tensor:
    """KL(backbone ‖ backbone with memory) per token, nats, a float32 scalar on the graph.

    Args:
        model: patched.
        texts: one a row, as ``encode`` has them; each is cut after ``TOKENS`` tokens.
        memory: is read, and written where it is not frozen: by sentence, if the adapter writes segments.
    """
    texts = texts.to(next(model.parameters()).device)
    ids, mask = texts.input_ids[:, :TOKENS], texts.attention_mask[:, :TOKENS]
    with torch.no_grad(), memory_disabled(model):
        wanted = model(ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    segments = {"segment_ids": texts.segment_ids[:, :TOKENS]} if identity_of(model).config.segmented else {}
    found = model(ids, attention_mask=mask, memory=memory, use_cache=False, **segments).logits.float().log_softmax(-1)
    each = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return each[mask.bool()].mean()


def settling_losses(
    model: nn.Module, tokenizer, batch: EpisodeBatch, random: Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers, and the divergence on texts that the memory has nothing to say to."""
    memory = write_memory(model, batch)
    memory.frozen = True
    losses, tokens = answer_losses(model, batch, memory)
    chats = [draw_text(random) for _ in range(memory.batch_size)]
    return losses.sum() / tokens.sum(), text_divergence(model, encode(tokenizer, chats), memory)


def settle(
    model: nn.Module, tokenizer, config: DeltaMemConfig, data: Sequence[str | os.PathLike], options: SettlingOptions
) -> dict[str, float]:
    """Train a patched model's adapter on; returns the last steps' mean ``answer_loss`` and ``text_divergence``.

    Args:
        config: the adapter's.
        data: files of episodes.
    """
    prepare_for_training(model)
    device, random = next(model.parameters()).device, Random(options.seed)
    build = partial(build_episode, tokenizer, config)
    episodes = EpisodeSchedule(ExampleFiles(data), build, options.steps * options.rows, options.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    found = []
    for step in (bar := trange(options.steps, desc="settling", unit="step")):
        places = range(step * options.rows, (step + 1) * options.rows)
        batch = collate([episodes[place] for place in places], tokenizer.pad_token_id).to(device)
        answer, divergence = settling_losses(model, tokenizer, batch, random)
        optimizer.zero_grad()
        (answer + options.weight * divergence).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        found.append([answer.item(), divergence.item()])
        bar.set_postfix(loss=f"{found[-1][0]:.3f}", divergence=f"{found[-1][1]:.4f}")
    model.eval()
    answer, divergence = torch.tensor(found[-50:]).mean(0).tolist()
    return {"answer_loss": answer, "text_divergence": divergence}
