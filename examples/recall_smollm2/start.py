"""Where training starts: parameters that already write what a fact's value is, and little else.

From random projections nothing is learnt for hundreds of steps: a state sums up dozens of tokens whose hidden states
differ little from their mean, and of what is read the value's own token is a small part. So the start is taken from the
backbone's hidden states of a few hundred statements, layer by layer:

- values: the principal directions in which the values' tokens differ, at unit variance, none along the mean;
- gates: Fisher's linear discriminant between the values' tokens and all others;
- queries: the keys' projection, so that like is read by like.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import nn

from deltamem_fast import memory_disabled
from deltamem_fast.adapter.record import record_of

from .episodes import message, opened, talk
from .facts import draw_facts
from .pool import Encoder

STATEMENTS, TALKS = 400, 60
# β's logit, of a value's token and of others; standard deviations of the noise between them are not looked at.
OPEN, SHUT = 1.0, -4.0
RIDGE = 0.05  # of the mean variance, added to it: hidden states have directions with hardly any


def structured_start(model: nn.Module, encoder: Encoder, openings: Sequence[str], seed: int = 0) -> None:
    """Set a patched model's fresh parameters as above; its outputs' projections stay as they are.

    Args:
        openings: what may stand before a statement.
    """
    random = Random(f"start {seed}")
    rows = [_statement(encoder, random, openings) for _ in range(STATEMENTS)]
    rows += [(encoder.told(talk(random, held_out=False)).ids[:96], []) for _ in range(TALKS)]
    record = record_of(model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in record.attentions}
    with torch.no_grad(), memory_disabled(model):
        hooks = [
            attention.register_forward_pre_hook(_kept_by(seen[name]), with_kwargs=True)
            for name, attention in record.attentions.items()
        ]
        try:
            for ids, _ in rows:
                model.model(torch.tensor([ids], device=model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    of_value = torch.cat([torch.tensor([i in places for i in range(len(ids))]) for ids, places in rows])
    for name, attention in record.attentions.items():
        _set(attention.delta_memory, torch.cat(seen[name]).double(), of_value)


def _statement(encoder: Encoder, random: Random, openings: Sequence[str]) -> tuple[list[int], list[int]]:
    """Token ids of a chat in which one fact is stated, and the places of its value's tokens."""
    (fact,) = draw_facts(random, 1, held_out=False)
    text = encoder.render([message("user", opened(random, fact.statement(random), openings))])
    start = text.rindex(fact.bare_value)
    found = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    stop = start + len(fact.bare_value)
    return found["input_ids"], [i for i, (a, b) in enumerate(found["offset_mapping"]) if b > start and a < stop]


def _kept_by(found: list[torch.Tensor]):
    def keep(module: nn.Module, arguments: tuple, named: dict) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        found.append(hidden[0].cpu())

    return keep


@torch.no_grad()
def _set(memory: nn.Module, hidden: torch.Tensor, of_value: torch.Tensor) -> None:
    """One layer's start, from hidden states, float64 [N, d], of which ``of_value`` are of values."""
    values, others = hidden[of_value], hidden[~of_value]
    size = memory.memory_v_proj.shape[0]
    mean = hidden.mean(0)
    deviations = values - values.mean(0)
    # Not along the mean, which all tokens share.
    deviations -= (deviations @ mean)[:, None] * mean / mean.square().sum()
    _, strength, directions = torch.linalg.svd(deviations, full_matrices=False)
    rows = directions[:size] / (strength[:size, None] / len(values) ** 0.5)
    # One direction after another to the heads in turn: each gets strong and weak ones.
    heads = memory.config.num_state_heads
    order = torch.arange(size).reshape(-1, heads).T.flatten()
    memory.memory_v_proj.copy_(rows[order])
    within = (torch.cov(values.T) + torch.cov(others.T)) / 2
    within += RIDGE * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    way = torch.linalg.solve(within, values.mean(0) - others.mean(0))
    way *= (OPEN - SHUT) / (way @ (values.mean(0) - others.mean(0)))
    memory.beta_proj.copy_(way.expand_as(memory.beta_proj))
    memory.beta_bias.fill_(float(OPEN - way @ values.mean(0)))
    memory.memory_q_proj.copy_(memory.memory_k_proj)
