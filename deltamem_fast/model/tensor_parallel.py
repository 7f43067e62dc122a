"""Tensor parallelism: each process has some rows of q, k and v, and all of the memory.

States, adapters and o are the same in all processes. A correction is added to the rows that a process has; Δo after the
sum over processes that is o's own. Forwards exchange nothing for that. Backwards sum two gradients a head: of what was
read, and of the head's weight, each of which sees this process's rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shard:
    """Which of a head's rows a process has: ``size`` from ``first`` on; ``group``: the processes."""

    first: int
    size: int
    group: Any

    def part(self, reads: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What of reads [..., H·r] and a weight [out, H·r] makes this process's rows."""
        # Both are whole in every process, and get a gradient from these rows alone.
        reads, weight = (_summed(tensor, self.group) for tensor in (reads, weight))
        return reads, weight.narrow(0, self.first, self.size)


def is_distributed(weight: object) -> bool:
    """Whether a weight is a DTensor: torch's tensor parallelism, transformers' (by it since 5.17), and FSDP's."""
    return hasattr(weight, "placements") and hasattr(weight, "device_mesh")


def whole(weight: torch.Tensor | None) -> torch.Tensor | None:
    """All of a weight, in every process; each of them has to call this."""
    return weight.full_tensor() if is_distributed(weight) else weight


def why_unknown(weight: object) -> str:
    """Why it cannot be told which rows of a weight this process has, or ""."""
    if not is_distributed(weight):
        return ""
    mesh, placements = weight.device_mesh, weight.placements
    known = mesh.ndim == 1 and type(placements[0]).__name__ in ("Shard", "Replicate")
    return "" if known else f"is spread as {placements} over a mesh of {mesh.ndim} dimension(s)"


def shard_of(weight: object) -> Shard | None:
    """The rows of a linear's weight that this process has; None: all, or it is not known which."""
    if not is_distributed(weight) or why_unknown(weight) or not weight.placements[0].is_shard(0):
        return None
    mesh = weight.device_mesh
    rows, count, rank = weight.shape[0], mesh.size(), mesh.get_local_rank()
    most = -(-rows // count)  # the last processes may have fewer, or none
    first = min(rank * most, rows)
    return Shard(first, min(most, rows - first), mesh.get_group())


def group_of(weights: Iterable[object]) -> Any:
    """The processes that weights are spread over, or None."""
    return next((w.device_mesh.get_group() for w in weights if is_distributed(w)), None)


def of_the_first(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """Give every process of a group the first one's numbers: each has drawn its own."""
    first = torch.distributed.get_global_rank(group, 0)
    for parameter in parameters:
        torch.distributed.broadcast(parameter.data, first, group=group)


class _Summed(torch.autograd.Function):
    """The tensor itself; its gradient is summed over processes, each of which knows a part of it."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _summed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    return _Summed.apply(tensor, group) if torch.is_grad_enabled() and tensor.requires_grad else tensor
