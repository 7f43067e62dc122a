"""What the start's linear algebra finds, on statements and answers that it was not fitted to.

Values are any word, for all strategies: of SSW's own, the relations' lists, hardly a token would be new.

python -m examples.recall_smollm2.figures           five minutes on two CPU cores
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_fast import patch_model
from deltamem_fast.adapter.record import record_of
from deltamem_fast.display import columns
from deltamem_fast.model.loading import load_model

from . import start
from .__main__ import FIRST_LAYER, LAST_LAYER, STRATEGIES, adapter_config
from .facts import Words
from .hidden import Seen, hidden_states
from .pool import Encoder

FITTED = 0.75  # of statements and answers; the others are for the figures


def parts(layers: Sequence[Seen]) -> tuple[list[Seen], list[Seen]]:
    """Each layer's statements and answers in two parts: to fit, and to look at; their pairs stay together."""
    fitted, others = [], []
    for seen in layers:
        answered = int(FITTED * len(seen.pairs))
        told = seen.pairs[answered]
        # In SSW several tokens of an answer have one segment.
        answered = seen.pairs.index(told)
        # Those behind the last pair are not asked for.
        asked = max(seen.pairs) + 1
        rest = asked + int(FITTED * (len(seen.writing) - asked))
        given = int(FITTED * len(seen.answers))
        first = replace(
            seen, writing=seen.writing[:told] + seen.writing[asked:rest],
            values=seen.values[:told] + seen.values[asked:rest], answering=seen.answering[:answered],
            pairs=seen.pairs[:answered], answers=seen.answers[:given], gradients=seen.gradients[:given],
        )  # fmt: skip
        second = replace(
            seen, writing=seen.writing[told:asked] + seen.writing[rest:],
            values=seen.values[told:asked] + seen.values[rest:], answering=seen.answering[answered:],
            pairs=[place - told for place in seen.pairs[answered:]], answers=seen.answers[given:],
            gradients=seen.gradients[given:],
        )  # fmt: skip
        fitted.append(first)
        others.append(second)
    return fitted, others


def response_figures(response: torch.Tensor, fitted: Seen, others: Seen, rows: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of a logit's gradient with the token's row of the output layer, and with that row's response.

    Of tokens that no fitted answer has.
    """
    known = set(fitted.answers)
    places = [i for i, token in enumerate(others.answers) if token not in known]
    given = rows[torch.tensor([others.answers[i] for i in places])]
    gradients = torch.stack([others.gradients[i] for i in places]).double()
    own, found = (F.cosine_similarity(ways, gradients).mean().item() for ways in (given, given @ response))
    return own, found


@torch.no_grad()
def value_ranks(
    memories: Sequence[nn.Module], others: Sequence[Seen], responses: Sequence[torch.Tensor], known: set[int]
) -> torch.Tensor:
    """How many tokens a value that is passed on without loss points to more than to its own: int64 [N].

    Args:
        responses: of each layer, all tokens' directions, float64 [V, d].
        known: the token ids of the fitted statements, which are left out.
    """
    places = [i for i, token in enumerate(others[0].values) if token not in known]
    scores: torch.Tensor | float = 0.0
    for memory, seen, response in zip(memories, others, responses):
        states = torch.stack([seen.writing[i] for i in places])
        passed_on = states @ memory.memory_v_proj.T.cpu() @ memory.delta_o_proj.T.cpu()
        scores = scores + passed_on.double() @ response.T
    wanted = torch.tensor([others[0].values[i] for i in places])
    return (scores > scores.gather(1, wanted[:, None])).sum(1)


@torch.no_grad()
def key_figures(memory: nn.Module, others: Seen) -> tuple[float, float]:
    """Mean cosine of an answer's query with its own statement's key, all heads, and that with others' (deviation)."""
    heads, rank = memory.config.num_state_heads, memory.config.rank

    def directions(states: list[torch.Tensor], projection: torch.Tensor) -> torch.Tensor:
        return F.normalize(torch.tanh(torch.stack(states) @ projection.T.cpu()).unflatten(-1, (heads, rank)), dim=-1)

    keys = directions([others.writing[i] for i in others.pairs], memory.memory_k_proj)
    queries = directions(others.answering, memory.memory_q_proj)
    agreed = torch.einsum("nhi,mhi->nm", keys, queries) / heads
    away = agreed[~torch.eye(len(agreed), dtype=torch.bool)]
    return agreed.diagonal().mean().item(), away.std().item()


def main(arguments: list[str] | None = None) -> int:
    """Print the figures of one strategy's start; returns the exit status."""
    parser = argparse.ArgumentParser("python -m examples.recall_smollm2.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=STRATEGIES, default=STRATEGIES[0], help="%(default)s by default")
    parser.add_argument("--seed", type=int, default=0, help="of the statements (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = load_model("smollm2", dtype="float32", quiet=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    config = adapter_config(options.strategy, range(FIRST_LAYER, LAST_LAYER + 1))
    patch_model(model, config)
    encoder = Encoder(tokenizer, config)
    layers = hidden_states(model, encoder, Words.of(tokenizer), Random(f"start {options.seed}"))
    print("\n".join(table(model, layers)))
    return 0


def table(model: nn.Module, layers: Sequence[Seen]) -> list[str]:
    """The figures as lines; sets the patched model's parameters by the fitted part."""
    fitted, others = parts(layers)
    rows = start.output_rows(model)
    start.set_parameters(model, fitted)
    memories = [attention.delta_memory for attention in record_of(model).attentions.values()]
    lines = [["layer", "gradient and output row", "and response", "query and own key", "others' (deviation)"]]
    responses = []
    for index, memory, first, second in zip(memories[0].config.target_layers, memories, fitted, others):
        response, _ = start.response_of(first, rows)
        responses.append(F.normalize(rows @ response, dim=1))
        figures = *response_figures(response, first, second, rows), *key_figures(memory, second)
        lines.append([str(index), *(f"{figure:.2f}" for figure in figures)])
    known = set(fitted[0].values)
    found = columns(lines)
    for count in (1, len(memories)):
        ranks = value_ranks(memories[:count], others[:count], responses[:count], known)
        components = count * memories[0].config.num_state_heads * memories[0].config.rank
        found.append(
            f"{components} components: of {len(ranks)} tokens that no fitted statement has, {len(rows):,} to choose "
            f"from, first {(ranks == 0).double().mean():.2f}, among the first ten {(ranks < 10).double().mean():.2f}"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
