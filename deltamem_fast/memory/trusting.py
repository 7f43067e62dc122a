"""How far a text may move a memory, and how far it did."""

from __future__ import annotations

import sys
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
        raise ArgumentError(f"{prefix}budget: got {shown(budget)}, allowed a number more than 0, or None")


def hold_back(memory, before: States, trust: float, budget: float | None) -> None:
    """Take a memory back towards ``before``, in place: S ← S₀ + τ (S − S₀), head by head.

    τ is ``trust``, or what ``budget`` allows if that is less: ‖τ (S − S₀)‖ ≤ budget · max(‖S₀‖, ‖S‖), Frobenius.

    Args:
        memory: a MemoryState, after a text was written.
        before: its states from before.
    """
    for layer, old in before.items():
        new = memory[layer]
        share: float | torch.Tensor = trust
        if budget is not None:
            norms = [state.norm(dim=(-2, -1), keepdim=True) for state in (old, new, new - old)]
            allowed = budget * torch.maximum(*norms[:2]) / norms[2].clamp(min=torch.finfo(torch.float32).tiny)
            share = allowed.clamp(max=trust)  # [B, H, 1, 1]
        memory.put(layer, torch.lerp(old, new, torch.as_tensor(share, device=new.device)), in_place=True)


def moved(before: States, after: States) -> float:
    """‖S − S₀‖ ÷ max(‖S₀‖, ‖S‖), the mean over heads, layers and rows: 0 nothing, 1 from an empty memory, 2 reversed.

    On a GPU it waits.
    """
    found = []
    for layer, old in before.items():
        new = after[layer]
        apart = (new - old).norm(dim=(-2, -1))
        larger = torch.maximum(old.norm(dim=(-2, -1)), new.norm(dim=(-2, -1)))
        found.append(torch.where(larger > 0, apart / larger, 0.0).mean().cpu())
    return float(torch.stack(found).mean()) if found else 0.0
