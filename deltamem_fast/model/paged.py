"""The paged cache of transformers' continuous batching, as attentions use it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn


def is_paged(cache: object) -> bool:
    """Whether ``cache`` is continuous batching's, which keeps the sequences of a row apart."""
    return type(cache).__name__ == "PagedAttentionCache"


def paged_update(
    attention: nn.Module, cache: Any, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an attention's own forward does with a paged cache: keys and values for its attention function.

    Args:
        key, value: [1, heads, T, D] of this forward's tokens.
        kwargs: for the attention function; are changed.
    """
    if _takes_cache(type(attention)):  # since transformers 5.24
        return cache.update(key, value, attention.layer_idx, kwargs=kwargs)
    kwargs["cache"] = cache  # the attention function updates it
    return key, value


@functools.cache
def _takes_cache(kind: type) -> bool:
    return "cache" in inspect.signature(kind.forward).parameters
