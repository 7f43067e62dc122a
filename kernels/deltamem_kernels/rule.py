"""The shape of the delta rule and the checks that every implementation of it shares.

Nothing here needs Triton, so a reference can share this module with the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import ArgumentError, ArgumentIndexError, ArgumentTypeError

STATE_UPDATE_MODES = ("standard", "lambda_outside", "no_lambda")
MAX_RANK = 64


@dataclass(frozen=True)
class DeltaRule:
    """What a layer's recurrence computes, apart from its weights.

    Attributes:
        rank: r, rows and columns of one state; 1 to 64.
        heads: H, independent states per layer (MSW: more than one).
        mode: ``standard``, ``lambda_outside`` or ``no_lambda``.
        row_gates: one gate per row (H·r of them), else one per head.
        coupled: λ = 1 − β, else λ has a projection of its own.
        normalize: q and k are unit(tanh(·)), else raw.
        beta_max, keep_max, value_max: the guard; each number of β, keep and |v| is held at or below it, which bounds
            every state (``bounds.row_bound``). 1, 1 and inf: there is none, and no bit changes.
    """

    rank: int
    heads: int = 1
    mode: str = "standard"
    row_gates: bool = True
    coupled: bool = True
    normalize: bool = True
    beta_max: float = 1.0
    keep_max: float = 1.0
    value_max: float = math.inf

    def __post_init__(self):
        if not 1 <= self.rank <= MAX_RANK:
            raise ArgumentError(f"rank: got {self.rank}, allowed 1 to {MAX_RANK}")
        if self.heads < 1:
            raise ArgumentError(f"heads: got {self.heads}, allowed 1 or more")
        if self.mode not in STATE_UPDATE_MODES:
            raise ArgumentError(f"mode: got {self.mode!r}, allowed {', '.join(STATE_UPDATE_MODES)}")
        for name in ("beta_max", "keep_max"):
            if not 0 < getattr(self, name) <= 1:
                raise ArgumentError(f"{name}: got {getattr(self, name)}, allowed more than 0, up to 1")
        if not self.value_max > 0:
            raise ArgumentError(f"value_max: got {self.value_max}, allowed more than 0")
        if self.guarded and not self.normalize:
            raise ArgumentError("normalize: got False with a guard, allowed True: raw keys of any length have no bound")

    @property
    def guarded(self) -> bool:
        """Whether gates or values are held below a bound."""
        return (self.beta_max, self.keep_max, self.value_max) != (1.0, 1.0, math.inf)

    @property
    def read_width(self) -> int:
        """H·r, the length of one token's read."""
        return self.heads * self.rank

    @property
    def gate_width(self) -> int:
        """How many β gates a token has: H·r with row gates, else H."""
        return self.read_width if self.row_gates else self.heads

    @property
    def has_lambda(self) -> bool:
        """Whether λ has a projection of its own (it has none when coupled, and no use in ``no_lambda``)."""
        return not self.coupled and self.mode != "no_lambda"

    @property
    def width(self) -> int:
        """W, the length of one token's raw projections: q, k, v, β and, if it has one, λ, in that order."""
        return 3 * self.read_width + self.gate_width * (2 if self.has_lambda else 1)

    @property
    def bias_width(self) -> int:
        """The length of the gate bias: β's, then λ's if it has a projection."""
        return self.gate_width * (2 if self.has_lambda else 1)


class ScanOutput(NamedTuple):
    """Result of a scan over N sequences.

    Attributes:
        reads: float32 [B, T, H·r], what each token read before its own write; 0 where it is masked.
        state: float32 [N, H, r, r], after each sequence's last token.
        skipped: int32 [N], how many unmasked tokens were treated as masked, because they or the state after them are
            not finite.
        checkpoints: float32 states after every n-th token, or None. [B, T // n, H, r, r] for rows of equal
            length; [T // n, H, r, r] for packed sequences, sequence i's rows starting at
            Σ_{j<i} (len_j // n), rows past the last sequence's zero.
    """

    reads: torch.Tensor
    state: torch.Tensor
    skipped: torch.Tensor
    checkpoints: torch.Tensor | None


def check_shape(name: str, tensor: torch.Tensor | None, *allowed: tuple[int, ...]) -> None:
    """Raises: ValueError unless the tensor has one of the shapes, or is None."""
    if tensor is not None and tuple(tensor.shape) not in allowed:
        raise ArgumentError(f"{name}: got shape {[*tensor.shape]}, allowed {' or '.join(str([*s]) for s in allowed)}")


def check_dtype(name: str, tensor: torch.Tensor | None, words: str, *allowed: torch.dtype) -> None:
    """Raises: TypeError unless the tensor has one of the dtypes, which the ``words`` name, or is None."""
    if tensor is not None and tensor.dtype not in allowed:
        raise ArgumentTypeError(f"{name}: got dtype {tensor.dtype}, allowed {words}")


def check_together(name: str, tensor: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises: ValueError unless the others, where given, are on the device of the tensor called ``name``."""
    for other, found in others.items():
        if found is not None and found.device != tensor.device:
            raise ArgumentError(f"{other}: on {found.device}, but {name} is on {tensor.device}")


def check_slots(slots: torch.Tensor, states: int) -> None:
    """Look at the slots, where the host need not wait for them: on a CPU, not traced.

    Raises: IndexError if one is neither −1 nor a row of the state.
    """
    if slots.device.type == "cpu" and type(slots) is torch.Tensor and not torch.compiler.is_compiling():
        if slots.numel() and not -1 <= int(slots.min()) <= int(slots.max()) < states:
            wrong = next(slot for slot in slots.tolist() if not -1 <= slot < states)
            raise ArgumentIndexError(f"slots: got {wrong}, allowed −1 to {states - 1}")


def check_arguments(
    projections: torch.Tensor,
    gate_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    checkpoint_every: int = 0,
) -> int:
    """Check the arguments of a scan, step or read (gate_bias None); return N, the number of sequences.

    Raises:
        ValueError: an argument has a wrong shape or value; the message names it, what it is and what is allowed.
        TypeError: an argument has a wrong dtype.
        IndexError: a slot names no row of the state (seen on a CPU; a GPU would have to be waited for).
    """
    tokens = projections.shape[:-1]
    if projections.ndim not in (2, 3) or projections.shape[-1] != rule.width:
        raise ArgumentError(
            f"projections: got shape {[*projections.shape]}, allowed [..., {rule.width}] with one or two leading "
            f"dimensions (q, k, v and gates of rank {rule.rank}, {rule.heads} head(s))"
        )
    if not projections.dtype.is_floating_point:
        raise ArgumentTypeError(f"projections: got dtype {projections.dtype}, allowed floating point")
    check_shape("gate_bias", gate_bias, (rule.bias_width,))
    if math.prod(tokens) * rule.heads >= 2**31:
        raise ArgumentError(f"projections: got {math.prod(tokens)} tokens × {rule.heads} head(s), allowed below 2^31")
    sequences = tokens[0]
    if cu_seqlens is not None:
        if projections.ndim != 3 or tokens[0] != 1:
            raise ArgumentError(
                f"projections: got shape {[*projections.shape]} with cu_seqlens, allowed [1, T, {rule.width}]"
            )
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
            raise ArgumentError(f"cu_seqlens: got shape {[*cu_seqlens.shape]}, allowed [N + 1]")
        check_dtype("cu_seqlens", cu_seqlens, "int32 or int64", torch.int32, torch.int64)
        sequences = cu_seqlens.numel() - 1
    check_shape("mask", mask, tuple(tokens))
    check_dtype("mask", mask, "bool (True = a real token)", torch.bool)
    if slots is not None:
        if state is None:
            raise ArgumentError("slots: given without a state to index")
        check_shape("slots", slots, (sequences,))
        check_dtype("slots", slots, "int32 or int64", torch.int32, torch.int64)
    if state is not None:
        rows = "any" if slots is not None else sequences
        if state.ndim != 4 or tuple(state.shape[1:]) != (rule.heads, rule.rank, rule.rank):
            allowed = f"[{rows}, {rule.heads}, {rule.rank}, {rule.rank}]"
            raise ArgumentError(f"state: got shape {[*state.shape]}, allowed {allowed}")
        if slots is None and state.shape[0] != sequences:
            raise ArgumentError(f"state: got {state.shape[0]} rows for {sequences} sequences; give slots to map them")
        check_dtype("state", state, "float32 (the reference also takes float64)", torch.float32, torch.float64)
        if slots is not None:
            check_slots(slots, state.shape[0])
    if checkpoint_every < 0:
        raise ArgumentError(f"checkpoint_every: got {checkpoint_every}, allowed 0 (none) or more")
    check_together(
        "projections", projections,
        gate_bias=gate_bias, state=state, mask=mask, cu_seqlens=cu_seqlens, slots=slots,
    )  # fmt: skip
    return sequences
