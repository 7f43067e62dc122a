"""The raw projections of a forward's tokens, layer by layer: what the operators and the inspection compute from."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

# One forward's raw projections: layer index → [B, T, W] in the model's dtype, off the graph.
Projections = dict[int, torch.Tensor]

_current: contextvars.ContextVar[list[Projections] | None] = contextvars.ContextVar("deltamem_capture", default=None)


@contextlib.contextmanager
def capture_projections() -> Iterator[list[Projections]]:
    """Inside, each forward of a patched model appends its tokens' raw projections to the list that is yielded.

    W is the rule's width: q, k, v, β (and λ), before tanh, normalisation, bias and sigmoid, as
    ``reference.split_projections`` takes them. Holds for this context (thread or task) only; a torch.compile'd
    region is not seen. Of nested ones the innermost gets them.
    """
    found: list[Projections] = []
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


def current_capture() -> list[Projections] | None:
    """The list of the innermost ``capture_projections``, or None outside and in compiled regions."""
    return None if torch.compiler.is_compiling() else _current.get()
