"""The arguments of the operators as PyTorch's dispatcher takes them, flat, said once for every backend.

A backend puts its schemas together from these fragments and registers them by ``operator``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from .layout import HeadLayout
from .rule import DeltaRule

TOKENS = "Tensor projections, Tensor gate_bias"
# A DeltaRule. Its mode is called ``update`` here: an operator that mutates cannot have an argument "mode", with which
# PyTorch's functionalization would mix it up.
RULE = (
    "SymInt rank, SymInt heads, str update, bool row_gates, bool coupled, bool normalize, "
    "float beta_max, float keep_max, float value_max"
)
RULE_SIZE = RULE.count(",") + 1
ROWS = "Tensor? mask, Tensor? slots"
SEQUENCES = "Tensor? mask, Tensor? cu_seqlens, Tensor? slots"
DELTA = "Tensor reads, Tensor weight, float scale"
NORM = "Tensor? norm_weight, float eps"
LAYOUT = "SymInt heads_q, SymInt heads_k, SymInt heads_v, SymInt dim, SymInt rotary"
STEERING = (
    "Tensor? w_q, Tensor? w_k, Tensor? w_v, Tensor? w_o, float scale, Tensor? scale_raw, float scale_max, "
    "Tensor? q_norm, Tensor? k_norm, float eps"
)
ROPE = "Tensor? cos, Tensor? sin"


def flat_rule(rule: DeltaRule) -> tuple:
    """A rule as ``RULE`` has it; ``DeltaRule(*flat)`` is the rule again."""
    guard = rule.beta_max, rule.keep_max, rule.value_max
    return rule.rank, rule.heads, rule.mode, rule.row_gates, rule.coupled, rule.normalize, *guard


def flat_layout(layout: HeadLayout) -> tuple:
    """A layout as ``LAYOUT`` has it. A Steering is a tuple of what ``STEERING`` has already."""
    return layout.q, layout.k, layout.v, layout.dim, layout.rotary


def operator(name: str, arguments: str, results: str = "Tensor", *, fake: Callable) -> Callable:
    """Register the decorated function as the operator ``name``.

    Args:
        arguments: its schema's; what is changed in place is a ``Tensor(a0!)``, 0 being its place.
        results: its schema's: "Tensor", "(Tensor, Tensor)", "()".
        fake: makes empty results for a compiler, of the same arguments.
    """
    changed = re.findall(r"Tensor\(a\d+!\) (\w+)", arguments)

    def register(function: Callable) -> torch.library.CustomOpDef:
        schema = f"({arguments}) -> {results}"
        made = torch.library.custom_op(name, function, mutates_args=changed, schema=schema)
        made.register_fake(fake)
        return made

    return register


def fake_reads(projections: Tensor, rank: int, heads: int) -> Tensor:
    """Reads, float32: projections [..., W] → [..., H·r]."""
    return projections.new_empty((*projections.shape[:-1], heads * rank), dtype=torch.float32)


def fake_decode(packed: Tensor, rank: int, heads: int, w_o: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reads of a packed row, float32 [B, H·r], and Δo, which is empty without its weights."""
    reads = packed.new_empty((packed.shape[0], heads * rank), dtype=torch.float32)
    return reads, packed.new_empty(0 if w_o is None else (packed.shape[0], w_o.shape[0]))


def or_empty(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An operator returns a tensor in any case; one that is empty lies on the device of ``other``."""
    return other.new_empty(0) if tensor is None else tensor


def like(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A contiguous tensor of the same shape, for a gradient; empty for None, on the device of ``other``."""
    return other.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


def needs_operator(*arguments: object) -> bool:
    """Whether a compiler or autograd must see a call with these; else it goes past the dispatcher."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
