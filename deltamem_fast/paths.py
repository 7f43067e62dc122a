"""Which way a layer's attention runs: the fused forward for Llama-shaped attention, or the class's own."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field

import torch
from torch import nn

from deltamem_kernels.layout import HeadLayout, Steering

from .memory import DeltaMemory
from .packing import PackedRows, has_own_storage

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LlamaShape:
    """What tells one Llama-shaped attention from another.

    Attributes:
        norms: it has q_norm and k_norm, RMS norms over a head, before RoPE.
        rope: the attribute that says whether this layer has RoPE; "" = every layer has.
        window: where the sliding window stands: ``module``, ``config``, or "" = there is none.
    """

    norms: bool = False
    rope: str = ""
    window: str = ""


SHAPES = {
    "transformers.models.llama.modeling_llama.LlamaAttention": LlamaShape(),
    "transformers.models.mistral.modeling_mistral.MistralAttention": LlamaShape(window="config"),
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention": LlamaShape(window="module"),
    "transformers.models.qwen3.modeling_qwen3.Qwen3Attention": LlamaShape(norms=True, window="module"),
    "transformers.models.smollm3.modeling_smollm3.SmolLM3Attention": LlamaShape(rope="use_rope", window="module"),
}
# The names that the forward of such an attention uses. One that uses another computes something else.
_FORWARD_NAMES = frozenset(
    "ALL_ATTENTION_FUNCTIONS _attn_implementation apply_rotary_pos_emb attention_dropout config contiguous "
    "eager_attention_forward get_interface getattr head_dim k_norm k_proj layer_idx o_proj q_norm q_proj reshape "
    "scaling shape sliding_window training transpose update use_rope v_proj view".split()
)


@dataclass(frozen=True)
class LayerPath:
    """How one layer's attention runs. ``path`` is ``fast`` or ``generic``; ``reason``, why it is generic, or ""."""

    path: str
    reason: str = ""


@dataclass(eq=False)
class LayerWeights:
    """The packed weights of one layer, and what its fast path needs to know. Made anew by ``refresh``."""

    reason: str = "not looked at yet"
    rows: PackedRows | None = None
    bias: PackedRows | None = None
    gate_bias: PackedRows | None = None
    first_memory_row: int = 0
    heads: tuple[int, int, int] = (0, 0, 0)
    layouts: dict[int, HeadLayout] = field(default_factory=dict)
    parts: tuple[nn.Module, ...] = ()
    part_names: tuple[str, ...] = ()
    part_hooks: tuple[dict, ...] = ()
    part_attributes: tuple[dict, ...] = ()
    shape: LlamaShape | None = None
    prepared: dict = field(default_factory=dict)
    _steering: Steering | None = None
    _steered_by: tuple[tuple[dict, str, nn.Parameter], ...] = ()

    def __deepcopy__(self, memo) -> LayerWeights:
        # A copy's weights lie elsewhere: the copied PatchRecord looks at them anew.
        return LayerWeights()

    def refresh(self, attention: nn.Module, memory: DeltaMemory) -> None:
        """Choose the path again and pack the weights for it."""
        reason = why_generic(attention, memory)
        memory_rows = [(memory, name) for name in memory.row_names]
        if reason:
            rows, bias, first, parts = memory_rows, None, 0, ()
        else:
            parts = tuple(attention._modules[name] for name in _parts_of(attention))
            projections = [attention._modules[name] for name in PROJECTIONS[:3]]
            rows = [(projection, "weight") for projection in projections] + memory_rows
            first = sum(projection.out_features for projection in projections)
            bias = None
            if any(projection.bias is not None for projection in projections):
                bias = [
                    (None, projection.out_features) if projection.bias is None else (projection, "bias")
                    for projection in projections
                ] + [(None, memory.rule.width)]
            self.heads = tuple(projection.out_features // attention.head_dim for projection in projections)
        self.layouts, self.prepared, self._steering = {}, {}, None
        self.shape = shape_of(attention)
        self.reason, self.first_memory_row, self.parts = reason, first, parts
        self.part_names = _parts_of(attention) if parts else ()
        self.part_hooks = tuple(hooks for m in parts for hooks in (m._forward_hooks, m._forward_pre_hooks))
        self.part_attributes = tuple(map(vars, parts))
        self.rows = _packed(self.rows, rows)
        if bias is None and self.bias is not None:
            self.bias.unpack()
        self.bias = None if bias is None else _packed(self.bias, bias)
        self.gate_bias = _packed(self.gate_bias, [(memory, name) for name in memory.gate_bias_names])

    def release(self) -> None:
        """Give every parameter its own storage again."""
        for packed in (self.rows, self.bias, self.gate_bias):
            if packed is not None:
                packed.unpack()

    def memory_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory's rows [W, d] and the gates' biases, both as stored and off the autograd graph."""
        rows = self.rows.get()
        return rows[self.first_memory_row :] if self.first_memory_row else rows, self.gate_bias.get()

    def layout(self, head_dim: int, rotary: int) -> HeadLayout:
        """The packed row's layout for RoPE over ``rotary`` numbers."""
        found = self.layouts.get(rotary)
        if found is None:
            found = self.layouts[rotary] = HeadLayout(*self.heads, head_dim, rotary)
        return found

    def applies(self, attention: nn.Module, hidden_states: torch.Tensor) -> bool:
        """Whether the fused forward is right for this call: nothing to differentiate, the parts as they were."""
        if self.reason or torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
            return False
        if tuple(map(attention._modules.get, self.part_names)) != self.parts or any(self.part_hooks):
            return False
        for attributes in self.part_attributes:
            if "forward" in attributes:
                return False
        return True

    def steering(self, attention: nn.Module, memory: DeltaMemory) -> Steering:
        """What the memory's layer adds to its heads, as the kernels take it."""
        for parameters, name, parameter in self._steered_by:
            if parameters[name] is not parameter:
                self._steering = None
        if self._steering is None:
            self._steering, self.prepared = _steering_of(memory, attention, self.shape.norms), {}
            self._steered_by = _sources(self._steering, memory, attention)
        return self._steering


def _packed(current: PackedRows | None, members: list) -> PackedRows:
    """Packed ``members``: the current rows if they are the same, so that nothing is copied twice."""
    if current is None or current.members != members or not current.is_whole():
        if current is not None and current.members != members:
            current.unpack()
        current = PackedRows(members)
        current.pack()
    return current


def _parts_of(attention: nn.Module) -> tuple[str, ...]:
    return (*PROJECTIONS, "q_norm", "k_norm") if shape_of(attention).norms else PROJECTIONS


def shape_of(attention: nn.Module) -> LlamaShape | None:
    """The data of a Llama-shaped attention, or None: an unknown class, or one that computes something else."""
    kind = type(attention)
    return SHAPES.get(f"{kind.__module__}.{kind.__qualname__}")


def why_generic(attention: nn.Module, memory: DeltaMemory) -> str:
    """Why the fused forward does not apply to a layer, or "" if it does."""
    shape, kind = shape_of(attention), type(attention)
    if shape is None:
        return f"{kind.__name__} is not one of the attentions that the fused forward knows"
    unknown = set(inspect.unwrap(kind.forward).__code__.co_names) - _FORWARD_NAMES
    if unknown:
        return f"the forward of this version's {kind.__name__} uses {', '.join(sorted(unknown))}"
    parameters = []
    for name in _parts_of(attention):
        part = attention._modules.get(name)
        wanted = nn.Linear if name in PROJECTIONS else getattr(sys.modules[kind.__module__], _norm_name(kind), None)
        if type(part) is not wanted:
            return f"{name} is a {type(part).__name__}, not a plain {getattr(wanted, '__name__', 'RMS norm')}"
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return f"{name} has hooks"
        parameters += [(f"{name}.{key}", value) for key, value in part._parameters.items() if value is not None]
    parameters += list(memory.named_parameters())
    first = parameters[0][1]
    if first.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the weights are {first.dtype}"
    for name, value in parameters:
        if type(value) is not nn.Parameter or type(value.data) is not torch.Tensor:
            return f"{name} is a {type(value).__name__} (sharded or quantised)"
        if value.device.type == "meta":
            return f"{name} is offloaded"
        if value.dtype != first.dtype or value.device != first.device:
            return f"{name} is {value.dtype} on {value.device}, q_proj {first.dtype} on {first.device}"
    return _why_unpackable(attention, memory, first)


def _norm_name(kind: type) -> str:
    return kind.__name__.removesuffix("Attention") + "RMSNorm"


def _why_unpackable(attention: nn.Module, memory: DeltaMemory, weight: torch.Tensor) -> str:
    if attention.head_dim % 2:
        return f"a head of {attention.head_dim} numbers has no halves for RoPE"
    if weight.shape[1] * weight.element_size() % 64:
        # The backbone's own matmuls must give the same bits on a view: libraries look at the alignment.
        return f"a row of {weight.shape[1]} {weight.dtype} numbers is not a multiple of 64 bytes"
    ours = memory.weights.rows.parameters() if memory.weights is not None and memory.weights.rows is not None else []
    packed = {id(parameter) for parameter in ours}
    for name in PROJECTIONS[:3]:
        value = attention._modules[name].weight
        if value.numel() == 0 or not (id(value) in packed or has_own_storage(value.data)):
            return f"{name}.weight is a view of a storage that others may use"
    return ""


def _steering_of(memory: DeltaMemory, attention: nn.Module, norms: bool) -> Steering:
    """What the memory's layer adds to its heads, as the kernels take it."""
    parameters, config = memory._parameters, memory.config
    heads = config.delta_heads
    q_norm = attention._modules["q_norm"] if norms else None
    return Steering(
        q=parameters["delta_q_proj"] if "q" in heads else None,
        k=parameters["delta_k_proj"] if "k" in heads else None,
        v=parameters["delta_v_proj"] if "v" in heads else None,
        o=parameters["delta_o_proj"] if "o" in heads and not config.delta_o_rmsnorm else None,
        scale=config.scale,
        scale_raw=parameters["delta_scale_raw"] if config.trainable_delta_scale else None,
        scale_max=config.delta_scale_max,
        q_norm=q_norm._parameters["weight"] if norms else None,
        k_norm=attention._modules["k_norm"]._parameters["weight"] if norms else None,
        eps=q_norm.variance_epsilon if norms else 1e-6,
    )


def _sources(steering: Steering, memory: DeltaMemory, attention: nn.Module) -> tuple:
    """Where each tensor of a Steering was found, to see whether another has been put there."""
    places = [(memory._parameters, f"delta_{head}_proj", getattr(steering, head)) for head in "qkvo"]
    places.append((memory._parameters, "delta_scale_raw", steering.scale_raw))
    for name in ("q_norm", "k_norm"):
        if name in attention._modules:
            places.append((attention._modules[name]._parameters, "weight", getattr(steering, name)))
    return tuple(place for place in places if place[2] is not None)
