"""How q, k, v and the memory's projections lie in one packed row, and what a memory does to each of them.

Nothing here needs Triton, so a reference can share this module with the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import ArgumentError, ArgumentTypeError
from .rule import DeltaRule, check_shape


@dataclass(frozen=True)
class HeadLayout:
    """The heads in one token's packed row: [q heads | k heads | v heads | the memory's W projections].

    Attributes:
        q, k, v: how many heads each has.
        dim: D, numbers of a head; even.
        rotary: how many leading numbers of a q or k head RoPE turns; even, 0 = none. Number j of the first half of
            them is paired with number j + rotary / 2.
    """

    q: int
    k: int
    v: int
    dim: int
    rotary: int = 0

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ArgumentError(f"dim: got {self.dim}, allowed an even number, 2 or more")
        if self.rotary < 0 or self.rotary % 2 or self.rotary > self.dim:
            raise ArgumentError(f"rotary: got {self.rotary}, allowed an even number, 0 to {self.dim}")
        for name in ("q", "k", "v"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)} heads, allowed 1 or more")

    @property
    def width(self) -> int:
        """Numbers of q, k and v together: where the memory's projections begin."""
        return (self.q + self.k + self.v) * self.dim

    def span(self, head: str) -> tuple[int, int]:
        """First number and number after the last of ``q``, ``k`` or ``v``."""
        first = {"q": 0, "k": self.q, "v": self.q + self.k}[head]
        return first * self.dim, (first + getattr(self, head)) * self.dim


class Steering(NamedTuple):
    """What is added to the heads and done to them. Any tensor may be None: then that part is left out.

    Attributes:
        q, k, v: [heads·D, H·r], of any floating dtype: Δ = scale · c · W reads is added first.
        o: [N, H·r]: Δo is returned, not added (``decode_`` only).
        scale: α / r.
        scale_raw: [1] or [4] (order q, k, v, o): c = sigmoid(raw) · scale_max; None: c = 1.
        scale_max: see scale_raw.
        q_norm, k_norm: [D], weight of the RMS norm of each q and k head, after Δ and before RoPE.
        eps: of these norms.
    """

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    o: torch.Tensor | None = None
    scale: float = 1.0
    scale_raw: torch.Tensor | None = None
    scale_max: float = 1.0
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6


def check_heads(
    packed: torch.Tensor,
    layout: HeadLayout,
    steering: Steering,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    read_width: int,
    rule: DeltaRule | None = None,
) -> None:
    """Check the arguments of ``steer_heads_`` ([B, T, N], no rule) or ``decode_`` ([B, N] and its rule).

    Raises:
        ValueError: an argument has a wrong shape; the message names it, what it is and what is allowed.
        TypeError: an argument has a wrong dtype.
    """
    width = layout.width + (0 if rule is None else rule.width)
    if packed.ndim != (3 if rule is None else 2) or packed.shape[-1] < width or packed.stride(-1) != 1:
        lead = "[B, T, N]" if rule is None else "[B, N]"
        raise ArgumentError(
            f"packed: got shape {list(packed.shape)} with strides {list(packed.stride())}, allowed {lead} with "
            f"N ≥ {width} and a last stride of 1"
        )
    if not packed.dtype.is_floating_point:
        raise ArgumentTypeError(f"packed: got dtype {packed.dtype}, allowed floating point")
    if (cos is None) != (sin is None) or (layout.rotary > 0) != (cos is not None):
        raise ArgumentError(f"cos, sin: allowed both where the layout has RoPE (rotary {layout.rotary}), else neither")
    length = packed.shape[1] if rule is None else 1
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor is not None and (
            tensor.ndim != 3
            or tensor.shape[0] not in (1, packed.shape[0])
            or tuple(tensor.shape[1:]) != (length, layout.rotary)
        ):
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}, allowed [1 or {packed.shape[0]}, {length}, {layout.rotary}]"
            )
    for head in ("q", "k", "v"):
        check_shape(head, getattr(steering, head), (getattr(layout, head) * layout.dim, read_width))
    if steering.o is not None and (steering.o.ndim != 2 or steering.o.shape[1] != read_width):
        raise ArgumentError(f"o: got shape {list(steering.o.shape)}, allowed [N, {read_width}]")
    check_shape("q_norm", steering.q_norm, (layout.dim,))
    check_shape("k_norm", steering.k_norm, (layout.dim,))
    check_shape("scale_raw", steering.scale_raw, (1,), (4,))
