"""Where training starts: an adapter that already remembers a little, by linear algebra alone.

From random projections nothing is learnt for hundreds of steps, and what is learnt then are the values of training,
each by heart. So the start is computed from the backbone's hidden states, layer by layer:

- values and outputs: a reduced-rank regression, on the hidden state that writes a value, of the direction that raises
  the logit of its token. That is the output layer's row through a linear response of the layers above, which is fitted
  to gradients: in upper layers the row itself points elsewhere (cosine 0.1 to 0.3). Each layer takes other components,
  so that together they pass on any word, seen in training or not;
- keys and queries: canonical correlations between the hidden states that write a value and those that answer with it.
  What the two share is whom and what a fact is about;
- of each head's two directions that are left, keys have one where nothing is stated, and queries the other where
  nothing is answered: what else is written goes where no answer reads, and what else reads finds nothing;
- gates: Fisher's linear discriminant between what writes a value and what else writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_fast.adapter.record import record_of

from .facts import Words
from .hidden import Seen, hidden_states
from .pool import Encoder

MOST = 8000  # about so many hidden states of what states and answers nothing are looked at
# β's logit, of what writes a value and of what else does.
OPEN, SHUT = 2.0, -5.0
# Of the mean variance, added to it: hidden states have directions with hardly any. Correlations fit noise sooner.
RIDGE, CORRELATION_RIDGE, INDICATOR_RIDGE = 0.03, 0.3, 0.003
QUIET = 0.15  # the longest that rows of the query projection are for facts, once queries find their keys
KEY, NULL = 0.1, 1.0  # standard deviation of a key's components; its null direction where nothing is stated
# A head's first components have nothing of facts: in keys one where nothing is stated, in queries one where nothing is
# answered; the others are for facts.
NULL_KEY, NULL_QUERY = 0, 1
NULLS = 2
KINDS = 4  # of keys, at least: where there are fewer heads, layers have different ones
LOGIT = 150.0  # what a value that is passed on without any loss would add to its token's, were all of it linear
RESPONSE_RIDGE = 0.3  # of the mean variance of the output layer's rows


def structured_start(
    model: nn.Module,
    encoder: Encoder,
    words: Words | None,
    seed: int = 0,
    kept: dict[tuple[bool, bool], list[Seen]] | None = None,
) -> None:
    """Set a patched model's fresh parameters as above: five minutes on two CPU cores for SmolLM2.

    Args:
        kept: what was computed for another adapter on the same layers, by whether segments write and whether values
            are any word; it grows.
    """
    kept = {} if kept is None else kept
    kind = encoder.config.segmented, words is not None
    if kind not in kept:
        kept[kind] = hidden_states(model, encoder, words, Random(f"start {seed}"))
    set_parameters(model, kept[kind])


def set_parameters(model: nn.Module, layers: Sequence[Seen]) -> None:
    """Set a patched model's parameters by what was seen in each of its layers."""
    rows = output_rows(model)
    responses = [response_of(seen, rows) for seen in layers]
    length = LOGIT / sum(gain for _, gain in responses)
    for place, (attention, seen) in enumerate(zip(record_of(model).attentions.values(), layers)):
        memory = attention.delta_memory
        _set_values(memory, seen, F.normalize(rows @ responses[place][0], dim=1), length, place, len(layers))
        _set_keys(memory, seen, place)
        _set_gates(memory, seen)


@torch.no_grad()
def clear_nulls(model: nn.Module, *, gradients: bool = False) -> None:
    """Leave keys nothing of the queries' null direction, and queries nothing of the keys': 0 after training, too.

    Then a query that points there reads exactly nothing, whatever the memory holds.

    Args:
        gradients: of the gradients, not of the parameters.
    """
    for attention in record_of(model).attentions.values():
        memory = attention.delta_memory
        for projection, component in ((memory.memory_k_proj, NULL_QUERY), (memory.memory_q_proj, NULL_KEY)):
            rows = projection.grad if gradients else projection
            rows.unflatten(0, (-1, memory.config.rank))[:, component] = 0


@torch.no_grad()
def quieten(model: nn.Module) -> None:
    """Shorten what queries are made of beside their null direction, where it is longer than ``QUIET``.

    A query has length 1: one that asks has hardly anything in the null direction and stays nearly as it is; in text,
    where that is strong, the rest is what is read of facts that do not matter to it.
    """
    for attention in record_of(model).attentions.values():
        memory = attention.delta_memory
        rows = memory.memory_q_proj.unflatten(0, (-1, memory.config.rank))[:, NULLS:]
        rows *= (QUIET / rows.norm(dim=-1, keepdim=True)).clamp(max=1)


def output_rows(model: nn.Module) -> torch.Tensor:
    """What last norm and output layer multiply a hidden state by, but for its size: float64 [V, d], centred."""
    rows = model.get_output_embeddings().weight.detach().double().cpu()
    return (rows - rows.mean(0)) * model.model.norm.weight.detach().double().cpu()


def response_of(seen: Seen, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What rows of the output layer are multiplied by to raise their logits in this layer, and by how much they do.

    A ridge regression of the gradients on their tokens' rows, towards a multiple of the identity.

    Returns:
        float64 [d, d]; the mean growth of a token's logit by a unit vector in its direction.
    """
    given, gradients = rows[torch.tensor(seen.answers)], torch.stack(seen.gradients).double()
    same = torch.eye(rows.shape[1], dtype=torch.float64)
    same = same * (given * gradients).sum() / given.square().sum()
    rest = given.T @ (gradients - given @ same) / len(given)
    found = same + torch.linalg.solve(_second_moment(given, RESPONSE_RIDGE), rest)
    return found, (F.normalize(given @ found, dim=1) * gradients).sum(1).mean().item()


def _without(ways: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Directions, [n, d], without what they have along a mean, which all tokens share."""
    return ways - (ways @ mean)[:, None] * mean / mean.square().sum()


def _second_moment(rows: torch.Tensor, ridge: float) -> torch.Tensor:
    found = rows.T @ rows / len(rows)
    return found + ridge * found.diagonal().mean() * torch.eye(len(found), dtype=found.dtype)


def _covariance(rows: torch.Tensor, ridge: float) -> torch.Tensor:
    return _second_moment(rows - rows.mean(0), ridge)


def _inverse_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.rsqrt() @ vectors.T


def _some(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows)[:: max(1, sum(map(len, rows)) // MOST)].double()


@torch.no_grad()
def _set_values(
    memory: nn.Module, seen: Seen, wanted: torch.Tensor, length: float, place: int, layers: int
) -> None:  # fmt: skip
    """Every ``layers``-th component from ``place`` on; ``length``: of the correction by all that is wanted."""
    writing = torch.stack(seen.writing).double()
    states = _without(writing - writing.mean(0), writing.mean(0))
    targets = wanted[torch.tensor(seen.values)]
    targets = targets - targets.mean(0)
    weights = torch.linalg.solve(_second_moment(states, RIDGE), states.T @ targets / len(states))
    _, strength, ways = torch.linalg.svd(states @ weights, full_matrices=False)
    strength = strength / len(states) ** 0.5
    heads, rank = memory.config.num_state_heads, memory.config.rank
    # One component after another to the heads in turn: each gets strong and weak ones.
    chosen = torch.arange(heads * rank).reshape(rank, heads).T.flatten() * layers + place
    there = chosen < len(strength)
    chosen = chosen[there]
    rows = _without((weights @ ways[chosen].T / strength[chosen]).T, writing.mean(0))
    columns = (ways[chosen] * strength[chosen, None]).T * length / (memory.config.alpha / rank)
    # Adam moves all numbers by as much: both shall have the same size.
    balance = (rows.square().mean() / columns.square().mean()) ** 0.25
    rows, columns = rows / balance, columns * balance
    memory.memory_v_proj.zero_()
    memory.memory_v_proj[there] = rows.to(memory.memory_v_proj)
    memory.delta_o_proj.zero_()
    memory.delta_o_proj[:, there] = columns.to(memory.delta_o_proj)


def _indicator(zero: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """The linear functional, without a bias, that is near 0 on some rows and near 1 on others; both count the same."""
    second = zero.T @ zero / len(zero) + one.T @ one / len(one)
    second += INDICATOR_RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    return torch.linalg.solve(second, one.mean(0))


@torch.no_grad()
def _set_keys(memory: nn.Module, seen: Seen, place: int) -> None:
    """Heads, and where there are few of them layers, take different components."""
    heads, rank = memory.config.num_state_heads, memory.config.rank
    writing, answering = torch.stack(seen.writing).double(), torch.stack(seen.answering).double()
    keys = writing[torch.tensor(seen.pairs)]
    a, b = (_inverse_root(_covariance(states, CORRELATION_RIDGE)) for states in (keys, answering))
    across = (keys - keys.mean(0)).T @ (answering - answering.mean(0)) / len(keys)
    left, _, right = torch.linalg.svd(a @ across @ b)
    for projection, ways, mean, null, direction in (
        (memory.memory_k_proj, (a @ left).T, keys.mean(0), _indicator(writing, _some(seen.written)), NULL_KEY),
        (memory.memory_q_proj, (b @ right.T).T, answering.mean(0), _indicator(answering, _some(seen.read)), NULL_QUERY),
    ):
        ways = _without(ways, mean)
        found = torch.zeros(heads, rank, len(mean), dtype=torch.float64)
        found[:, direction] = NULL * null
        kinds = max(heads, KINDS)
        for head in range(heads):
            components = ways[(head + place) % kinds :: kinds][: rank - NULLS]
            found[head, NULLS : NULLS + len(components)] = KEY * components
        projection.copy_(found.flatten(0, 1))


@torch.no_grad()
def _set_gates(memory: nn.Module, seen: Seen) -> None:
    writing, written = torch.stack(seen.writing).double(), _some(seen.written)
    within = (_covariance(writing, RIDGE) + _covariance(written, RIDGE)) / 2
    apart = writing.mean(0) - written.mean(0)
    way = torch.linalg.solve(within, apart)
    way *= (OPEN - SHUT) / (way @ apart)
    memory.beta_proj.copy_(way.expand_as(memory.beta_proj))
    memory.beta_bias.fill_(float(OPEN - way @ writing.mean(0)))
