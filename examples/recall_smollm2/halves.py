"""A frozen decoder in two halves: the layers below the memory, which are run once, and those with it.

Where only the upper layers have a memory, what the lower ones make of a sequence never changes. Their outputs are kept,
so that training runs the upper ones alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from deltamem_fast import memory_disabled


@contextlib.contextmanager
def upper_layers(model: nn.Module, first: int, stop: int | None = None) -> Iterator[None]:
    """Inside, the decoder of ``model`` consists of its layers from ``first`` on: ``inputs_embeds`` is their input.

    Args:
        stop: the first one that is left out again; None = all are there.
    """
    decoder = model.model
    layers = decoder.layers
    decoder.layers = nn.ModuleList(layers[first:stop])
    try:
        yield
    finally:
        decoder.layers = layers


@contextlib.contextmanager
def detached_layers(model: nn.Module) -> Iterator[None]:
    """Inside, no gradient goes from one layer to the next: what a layer writes still has one.

    For contexts that are told and not answered. Left out is what reading while telling changes in later layers' writes;
    saved is the backward pass of all layers.
    """
    hooks = [layer.register_forward_hook(_detached) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _detached(layer: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.detach()


@contextlib.contextmanager
def _lower_layers(model: nn.Module, first: int) -> Iterator[None]:
    decoder = model.model
    layers, norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = nn.ModuleList(layers[:first]), nn.Identity()
    try:
        with memory_disabled(model):
            yield
    finally:
        decoder.layers, decoder.norm = layers, norm


class LowerOutputs:
    """What the layers below ``first`` make of token sequences, computed once each and kept.

    Args:
        model: patched, with no memory below ``first``.
        first: the first layer that has one.
        dtype: of what is kept; None = the model's.
        kept: what is kept already, by its token ids; it grows. None = nothing yet.
    """

    def __init__(
        self, model: nn.Module, first: int, dtype: torch.dtype | None = None,
        kept: dict[tuple[int, ...], torch.Tensor] | None = None,
    ):  # fmt: skip
        self.model, self.first, self.dtype = model, first, dtype
        self._kept = {} if kept is None else kept

    def __call__(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of layer ``first``, [B, T, hidden], of rows padded on the right, and their mask, bool [B, T]."""
        keys = [tuple(row) for row in rows]
        self._compute([key for key in dict.fromkeys(keys) if key not in self._kept])
        found = [self._kept[key] for key in keys]
        dtype, device = self.model.dtype, self.model.device
        hidden = nn.utils.rnn.pad_sequence(found, batch_first=True).to(dtype)
        lengths = torch.tensor([len(key) for key in keys], device=device)
        return hidden, torch.arange(hidden.shape[1], device=device) < lengths[:, None]

    @torch.no_grad()
    def _compute(self, keys: list[tuple[int, ...]]) -> None:
        if not keys:
            return
        ids = nn.utils.rnn.pad_sequence([torch.tensor(key) for key in keys], batch_first=True).to(self.model.device)
        # Right padding: under a causal mask no real token sees it.
        with _lower_layers(self.model, self.first):
            found = self.model.model(ids, use_cache=False).last_hidden_state
        for key, hidden in zip(keys, found):
            self._kept[key] = hidden[: len(key)].to(self.dtype or hidden.dtype, copy=True)
