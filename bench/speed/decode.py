"""Decode on a static cache: compiled, and as a CUDA graph. One model against the others, in turns."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import StaticCache

from ..instrument.rows import Row, absent
from ..instrument.timing import capture, in_turns
from . import peers
from .model import Models

# Of torch.compile by name; ``graph`` captures the eager forward by hand.
MODES = {"graph": None, "compile": "default", "reduce-overhead": "reduce-overhead"}
WARM_UP = 3
MOVES = "the released package's state moves to another address at each call, which a CUDA graph cannot follow"
EAGER_ONLY = "the released package is timed eager only"


class StaticDecode:
    """A model, a static cache with a prompt in it, and the token that comes next; all at fixed addresses.

    Args:
        model: patched or not.
        ids: the prompt, [B, T].
        room: how many tokens may be decoded.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, room: int):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + room)
        logits = model(ids, past_key_values=self.cache, logits_to_keep=1).logits
        self.token = logits.argmax(-1).clone()

    def step(self, forward: Callable | None = None) -> None:
        """Decode one token with ``forward`` (None: the model's own); the likeliest one is fed next."""
        forward = self.model if forward is None else forward
        out = forward(self.token, past_key_values=self.cache, logits_to_keep=1)
        self.token.copy_(out.logits.argmax(-1))


def stepper(state: StaticDecode, mode: str, device: str, dry: bool) -> Callable[[], object]:
    """What decodes one token of ``state`` in ``mode``, warmed up, compiled or captured. Takes its time."""
    if MODES[mode] is None:
        return capture(state.step, device, WARM_UP)
    how = {"backend": "aot_eager"} if dry else {"mode": MODES[mode]}
    compiled = torch.compile(state.model, fullgraph=True, dynamic=False, **how)

    def step():
        torch.compiler.cudagraph_mark_step_begin()  # the compiler's own graphs reuse their memory from here on
        state.step(compiled)

    for _ in range(WARM_UP):
        step()
    return step


@torch.no_grad()
def rows(
    models: Models, mode: str, batch: int, context: int, tokens: int, turns: int, progress: Callable, dry: bool = False
) -> list[Row]:
    """Rows of one mode at one batch size.

    Args:
        models: the variants; the released one is named and left out.
        mode: of ``MODES``.
        batch, context: rows, and tokens in the cache before.
        tokens, turns: decoded in a turn, and how many turns.
        progress: gets a line for each slow thing.
        dry: compile with a stub.
    """
    parameters = models.parameters(mode=mode, batch=batch, context=context, tokens=tokens)
    variants = {name: model for name, model in models.variants.items() if name != "released"}
    ids = models.ids(batch, context)
    steps, states = {}, []
    torch._dynamo.reset()
    for name, model in variants.items():
        start = time.perf_counter()
        state = StaticDecode(model, ids, tokens * (turns + 1) + 2 * WARM_UP + 2)
        steps[name] = stepper(state, mode, models.device, dry)
        states.append(state)  # a graph writes to its cache and token: they must stay
        progress(f"{models.name}: {mode}, batch {batch}, {name} ready after {time.perf_counter() - start:.1f} s")

    def decode(step, turn):
        for _ in range(tokens):
            step()

    calls = {name: functools.partial(decode, step) for name, step in steps.items()}
    times = in_turns(calls, turns, models.device, warm_up=1, events=False)
    made = [row for row in models.rows("decode", parameters, times) if row.variant != "released"]
    if models.device == "cuda" and peers.released() is not None:
        made.append(absent("decode/released", MOVES if mode == "graph" else EAGER_ONLY, parameters))
    return made
