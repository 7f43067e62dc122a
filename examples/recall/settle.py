"""The end of an adapter's training: memory is to speak where it is asked, and to be silent elsewhere.

Trained on answers alone, an adapter that holds facts pulls every sentence towards them. So the last steps also show
ordinary text, read with a memory full of facts about others, and ask for the backbone's own prediction at each of its
tokens: KL(backbone ‖ backbone with memory), beside the loss of the answers.
"""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_fast import MemoryState, memory_disabled
from deltamem_fast.recall import task
from deltamem_fast.recall.chats import Chat, encode
from deltamem_fast.training import EpisodeBatch
from deltamem_fast.training.loss import answer_losses, write_memory

TOKENS = 96  # of a text, which is cut there


def draw_text(random: Random) -> Chat:
    """A conversation, messages that state facts, or small talk, in equal shares; names of the training texts."""
    kind = random.randrange(3)
    if kind == 0:
        return task.conversation(random, 4)
    if kind == 1:
        facts = task.draw_facts(random, 8, held_out=False)
        return task.telling(random, facts, held_out=False, distractors=0.5, updates=0.15)[0]
    return [message for _ in range(4) for message in task.small_talk(random, held_out=False)]


def text_divergence(model: nn.Module, tokenizer, chats: list[Chat], memory: MemoryState) -> torch.Tensor:
    """KL(backbone ‖ backbone with memory) per token, nats, a float32 scalar on the graph.

    Args:
        model: patched.
        chats: one text a row of ``memory``, which is read and not written.
    """
    batch = encode(tokenizer, chats).to(next(model.parameters()).device)
    ids, mask = batch.input_ids[:, :TOKENS], batch.attention_mask[:, :TOKENS]
    with torch.no_grad(), memory_disabled(model):
        wanted = model(ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    found = model(ids, attention_mask=mask, memory=memory, use_cache=False).logits.float().log_softmax(-1)
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
    return losses.sum() / tokens.sum(), text_divergence(model, tokenizer, chats, memory)
