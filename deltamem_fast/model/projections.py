"""Where an attention computes its q, k, v and output, as data, for those that name it otherwise than most."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from ..config import DELTA_HEADS
from .tensor_parallel import whole


@dataclass(frozen=True)
class Projections:
    """The linears of an attention.

    Attributes:
        inputs: of q, k and v; one alone gives all three, q's rows first, then k's, then v's.
        output: of o.
    """

    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)

    @functools.cached_property
    def heads(self) -> dict[str, str]:
        """Linear → the heads of which it gives the output, of ``q``, ``k``, ``v`` and ``o``, in their order."""
        inputs = self.inputs
        return (dict(zip(inputs, "qkv")) if len(inputs) == 3 else {inputs[0]: "qkv"}) | {self.output: "o"}


USUAL = Projections()
# By class, because a name alone does not say in which order one linear gives q, k and v.
OTHERS = {
    "transformers.models.lfm2.modeling_lfm2.Lfm2Attention": Projections(output="out_proj"),
    "transformers.models.lfm2_moe.modeling_lfm2_moe.Lfm2MoeAttention": Projections(output="out_proj"),
    "transformers.models.phi.modeling_phi.PhiAttention": Projections(output="dense"),
    "transformers.models.phi3.modeling_phi3.Phi3Attention": Projections(inputs=("qkv_proj",)),
    "transformers.models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAttention": Projections(
        inputs=("qkv_proj",)
    ),
}


@functools.cache
def projections_of(kind: type) -> Projections:
    """Those of an attention class, or of the class that it is derived from (FSDP derives one)."""
    names = (f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__)
    return next((OTHERS[name] for name in names if name in OTHERS), USUAL)


@dataclass(frozen=True)
class ProjectionRows:
    """The rows of one linear that give a head's output.

    Attributes:
        name: of the linear, on the attention.
        linear: with ``in_features``, ``out_features`` and ``weight``; quantised and LoRA's ones have them too.
        first, size: the rows.
    """

    name: str
    linear: nn.Module
    first: int
    size: int

    @property
    def linear_weight(self) -> torch.Tensor | None:
        """What the linear holds, or None."""
        return getattr(self.linear, "weight", None)

    @property
    def weight(self) -> torch.Tensor | None:
        """Weight [size, in] of one that is stored as [out, in]; else the linear's whole weight, as it is, or None.

        Of one that is spread over processes (tensor parallelism) each has to ask for it.
        """
        weight = whole(self.linear_weight)
        if weight is None or self.size == self.linear.out_features or weight.shape[0] != self.linear.out_features:
            return weight
        return weight.narrow(0, self.first, self.size)


def is_linear(module: object) -> bool:
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")


def rows_of(attention: nn.Module) -> dict[str, ProjectionRows]:
    """Where an attention computes ``q``, ``k``, ``v`` and ``o``; without those that it has no linear for."""
    found = {}
    for name, heads in projections_of(type(attention)).heads.items():
        linear = getattr(attention, name, None)
        if is_linear(linear):
            first = 0
            for head, size in zip(heads, sizes_in(attention, linear, heads)):
                found[head] = ProjectionRows(name, linear, first, size)
                first += size
    return {head: found[head] for head in DELTA_HEADS if head in found}


def query_linear(attention: nn.Module) -> nn.Module:
    """The linear that gives q."""
    return getattr(attention, projections_of(type(attention)).inputs[0])


def sizes_in(attention: nn.Module, linear: nn.Module, heads: str) -> tuple[int, ...]:
    """How many of a linear's outputs are each of ``heads``' (``qkv``, or a single one)."""
    if len(heads) == 1:
        return (linear.out_features,)
    config, dim = attention.config, attention.head_dim
    keys = config.num_key_value_heads * dim
    return linear.out_features - 2 * keys, keys, keys
