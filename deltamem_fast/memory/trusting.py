"""How far a text may move a memory, and how far it did."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..arguments import check_share, shown
from ..errors import ArgumentError
from .figures import States


def check_trust(trust: Any, budget: Any, prefix: str = "") -> None:
    """Raise ValueError unless ``trust`` is a number from 0 to 1, and ``budget`` one that is more than 0, or None."""
    check_share(trust, f"{prefix}trust")
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if budget is not None and not (number and 0 < budget <= sys.float_info.max):
        raise ArgumentError(f"{prefix}budget: got {shown(budget)}, allowed a finite number more than 0, or None")


def holds_back(trust: float, budget: float | None) -> bool:
    """Whether a text that is trusted so far may not move a memory as far as it would."""
    return trust < 1 or budget is not None


def hold_back(memory, before: States, trust: float, budget: float | None) -> None:
    """Take a memory back towards ``before``, in place: S ← S₀ + τ (S − S₀), head by head.

    τ is ``trust``, or what ``budget`` allows if that is less: ‖τ (S − S₀)‖ ≤ budget · ‖S₀‖, Frobenius. What was there
    counts, not what comes, or a loud text would set its own limit. A head in which nothing is goes the share τ of
    ``trust`` alone; one in which there is little grows by little at a time.

    Args:
        memory: a MemoryState, after a text was written.
        before: its states from before.
    """
    for layer, state in before.items():
        old, new = _wide(state), _wide(memory[layer])
        share = torch.full_like(old[..., :1, :1], trust)  # [B, H, 1, 1]
        if budget is not None:
            there, apart = (x.norm(dim=(-2, -1), keepdim=True) for x in (old, new - old))
            allowed = float(budget) * there / apart.clamp(min=torch.finfo(torch.float32).tiny)
            share = torch.where(there > 0, allowed.clamp(max=trust), share)
        memory.put(layer, torch.lerp(old, new, share).to(state.dtype), in_place=True)


@contextlib.contextmanager
def held_back(memory, before: States | None, trust: float, budget: float | None) -> Iterator[None]:
    """Inside, a text is written under the guard of such texts, and then ``hold_back``; wholly trusted, nothing is done.

    Args:
        before: the states of now, where the caller has a copy; None: one is made if it is needed.
    """
    if not holds_back(trust, budget):
        yield
        return
    before = memory.clone() if before is None else before
    with memory.untrusted():
        yield
    hold_back(memory, before, trust, budget)


def moved(before: States, after: States) -> float:
    """‖S − S₀‖ ÷ max(‖S₀‖, ‖S‖), the mean over heads, layers and rows: 0 nothing, 1 from an empty memory, 2 reversed.

    On a GPU it waits.
    """
    found = []
    for layer, state in before.items():
        old, new = _wide(state), _wide(after[layer])
        apart, before_norm, after_norm = (x.norm(dim=(-2, -1)) for x in (new - old, old, new))
        larger = torch.maximum(before_norm, after_norm)
        found.append(torch.where(larger > 0, apart / larger, 0.0).mean())
    found = [value.to(found[0].device) for value in found]
    return float(torch.stack(found).mean()) if found else 0.0


def _wide(state: torch.Tensor) -> torch.Tensor:
    """In float64, whose squares of float32's numbers do not overflow; Apple's GPUs have none."""
    return state.detach().to(torch.float32 if state.device.type == "mps" else torch.float64)
