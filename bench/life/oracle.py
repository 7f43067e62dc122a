"""The delta rule in float64, token by token, compiled: quick enough for ten million tokens.

Written from the equations and not from the loops that it judges; ``wrong`` compares it with the reference.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule


@njit(cache=True)
def _unit(raw, first, rank, out):
    square = 0.0
    for i in range(rank):
        out[i] = math.tanh(np.float64(raw[first + i]))
        square += out[i] * out[i]
    length = max(math.sqrt(square), 1e-6)
    for i in range(rank):
        out[i] /= length


@njit(cache=True)
def follow(projections, bias, heads, rank, decays, state, reads):
    """Read and write: projections float32 [B, T, W] of coupled row gates, bias float32 [H·r], state float64
    [B, H, r, r] (in place), reads float64 [B, T, H·r] (written). A token that is not finite reads 0 and is not written.

    Args:
        decays: keep is 1 − β; else 1 (mode ``no_lambda``).
    """
    width = heads * rank
    q, k = np.empty(rank), np.empty(rank)
    for n in range(projections.shape[0]):
        for t in range(projections.shape[1]):
            row = projections[n, t]
            finite = True
            for i in range(len(row)):
                finite = finite and math.isfinite(row[i])
            if not finite:
                reads[n, t] = 0.0
                continue
            for h in range(heads):
                _unit(row, h * rank, rank, q)
                _unit(row, width + h * rank, rank, k)
                for i in range(rank):
                    at = h * rank + i
                    beta = 1.0 / (1.0 + math.exp(-(np.float64(row[3 * width + at]) + np.float64(bias[at]))))
                    keep = 1.0 - beta if decays else 1.0
                    read = predicted = 0.0
                    for j in range(rank):
                        read += state[n, h, i, j] * q[j]
                        predicted += state[n, h, i, j] * k[j]
                    reads[n, t, at] = read
                    column = beta * np.float64(row[2 * width + at]) - beta * predicted
                    for j in range(rank):
                        state[n, h, i, j] = keep * state[n, h, i, j] + column * k[j]


def wrong(rule: DeltaRule, projections: torch.Tensor, bias: torch.Tensor) -> float:
    """How far ``follow`` is from the reference in float64 on these tokens, relative; of the state or the reads, the
    larger."""
    rows, tokens = projections.shape[:2]
    state = np.zeros((rows, rule.heads, rule.rank, rule.rank))
    reads = np.zeros((rows, tokens, rule.read_width))
    follow(projections.numpy(), bias.numpy(), rule.heads, rule.rank, rule.mode == "standard", state, reads)
    exact = reference.scan(projections, bias, None, rule, dtype=torch.float64)
    return max(distance(torch.from_numpy(state), exact.state), distance(torch.from_numpy(reads), exact.reads))


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖ in float64, of the row in which it is largest; NaN where one is not a number."""
    ours, exact = (tensor.detach().double().flatten(1) for tensor in (ours, exact))
    return float(((ours - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-300)).max())
