"""Which memory each request of a running batch brought along; in every worker.

vLLM tells its logits processors which sampling parameters stand in which row of the batch, also when rows move. That
is all that ours is for: it changes no logit. Model Runner V2 has processors of another kind, where memories are
refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict

import numpy as np
import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

from deltamem_kernels.rule import DeltaRule

from ..errors import ArgumentError, UnsupportedError
from .given import KEY, Given, check_arguments, read_arguments

MOST_KEPT = 4096  # last states that nobody has taken yet


@dataclasses.dataclass(eq=False)
class Request:
    """A request that brought a memory along.

    Attributes:
        given: what it brought.
        slot: where its first state is in the table, −1 without one.
        block: int, of no dimension: the cache's block that has its last state; None: nothing was written yet, or
            nobody will take it.
        tokens: how many have been written.
    """

    given: Given
    slot: int = -1
    block: torch.Tensor | None = None
    tokens: int = 0


class Requests:
    """The requests of a batch by row, and the last states of those that are over.

    Attributes:
        rows: by row of the batch, None for a request that brought nothing.
        table: float32 [L, slots, H, r, r], the states that requests start from; None until one brings one.
    """

    def __init__(self, rule: DeltaRule):
        self.rule = rule
        self.layers: list = []  # of States, in ascending order
        self.rows: dict[int, Request] = {}
        self.table: torch.Tensor | None = None
        self._free: list[int] = []
        self._kept: OrderedDict[str, tuple[int, bytes]] = OrderedDict()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[L, H, r, r] of one request's state."""
        return len(self.layers), self.rule.heads, self.rule.rank, self.rule.rank

    def update(self, batch_update) -> None:
        """Follow the batch: requests that left, came, and moved, in this order."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._leave(row)
        for row, params, *_ in batch_update.added:
            self._leave(row)
            given = read_arguments(params.extra_args, self.shape)
            if given is not None:
                self.rows[row] = Request(given, -1 if given.state is None else self._place(given.state))
        for first, second, direction in batch_update.moved:
            moved, replaced = self.rows.pop(first, None), self.rows.pop(second, None)
            if moved is not None:
                self.rows[second] = moved
            if replaced is not None:
                if direction == MoveDirectionality.SWAP:
                    self.rows[first] = replaced
                else:
                    self._close(replaced)

    def take(self, key: str) -> tuple[int, bytes] | None:
        """(tokens written, float32 [L, H, r, r] as bytes) of the request with this key, once; None: there is none.

        vLLM says that a request is over when the next step begins; until then its blocks are as it left them.
        """
        for request in self.rows.values():
            if request.given.key == key:
                self._keep(request)
        return self._kept.pop(key, None)

    def _leave(self, row: int) -> None:
        request = self.rows.pop(row, None)
        if request is not None:
            self._close(request)

    def _close(self, request: Request) -> None:
        if request.slot >= 0:
            self._free.append(request.slot)
        self._keep(request)

    def _keep(self, request: Request) -> None:
        key = request.given.key
        if key is None or request.block is None or request.tokens <= request.given.first:
            return
        state = torch.stack([layer.cache[request.block.long()] for layer in self.layers]).cpu()
        self._kept.pop(key, None)
        self._kept[key] = request.tokens, state.numpy().astype("<f4").tobytes()
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)

    def _place(self, state: np.ndarray) -> int:
        """Put a state into a free slot of the table, which grows."""
        if not self._free:
            count = 8 if self.table is None else self.table.shape[1]
            device = self.layers[0].cache.device
            more = torch.zeros(self.shape[0], count, *self.shape[1:], dtype=torch.float32, device=device)
            held = 0 if self.table is None else count
            self.table = more if self.table is None else torch.cat([self.table, more], 1)
            self._free = list(range(held, held + count))
        slot = self._free.pop()
        self.table[:, slot] = torch.from_numpy(state).to(self.table.device)
        return slot


class _Rows(LogitsProcessor):
    """Changes no logit; tells ``Requests`` who stands in which row."""

    shape: tuple[int, int, int, int]

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        check_arguments(sampling_params.extra_args, cls.shape)
        if sampling_params.n != 1 and KEY in (sampling_params.extra_args or {}):
            raise ArgumentError(f"n: got {sampling_params.n}, allowed 1 with {KEY}: it cannot be that of several")

    def __init__(self, vllm_config, device, is_pin_memory):
        self._layers = vllm_config.compilation_config.static_forward_context
        self._requests: Requests | None = None

    def update_state(self, batch_update) -> None:
        if self._requests is None:  # the model is loaded after this was made
            self._requests = next(
                (layer.requests for layer in self._layers.values() if hasattr(layer, "requests")), None
            )
        if self._requests is not None:
            self._requests.update(batch_update)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def _refusing():
    """The processor for Model Runner V2: no request may bring a memory along."""
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as Processor

    class NoRows(Processor):
        @classmethod
        def validate_params(cls, sampling_params) -> None:
            if read_arguments(sampling_params.extra_args) is not None:
                raise UnsupportedError(
                    "extra_args: got a delta-mem memory under Model Runner V2, allowed under V1 "
                    "(VLLM_USE_V2_MODEL_RUNNER=0)"
                )

        def add_request(self, req_idx, sampling_params) -> bool:
            return False

        def apply(self, logits, ctx):
            return logits

    return NoRows


def __getattr__(name: str):
    """``Rows_L_H_r_r``: the class that checks requests for states of this shape, before they reach an engine."""
    if name == "NoRows":
        return _refusing()
    found = re.fullmatch(r"Rows_(\d+)_(\d+)_(\d+)_(\d+)", name)
    if found is None:
        raise AttributeError(name)
    return type(name, (_Rows,), {"shape": tuple(map(int, found.groups()))})
