"""The attentions that the fused forward knows, as data, and why it does not apply to one."""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.nn.modules.module as _modules
from torch import nn

from ..adapter.layer import DeltaMemory
from .packing import can_pack, fills_its_storage
from .projections import projections_of
from .tensor_parallel import is_distributed


@dataclass(frozen=True)
class LlamaShape:
    """What tells one Llama-shaped attention from another.

    Attributes:
        norms: its RMS norms over a head of q and of k, before RoPE; empty = it has none.
        rope: the attribute that says whether this layer has RoPE; "" = every layer has.
        window: where the sliding window stands: ``module``, ``config``, or "" = there is none.
    """

    norms: tuple[str, ...] = ()
    rope: str = ""
    window: str = ""


_QK_NORM = ("q_norm", "k_norm")
SHAPES = {
    f"transformers.models.{name}": shape
    for name, shape in {
        "apertus.modeling_apertus.ApertusAttention": LlamaShape(norms=_QK_NORM),
        "arcee.modeling_arcee.ArceeAttention": LlamaShape(),
        "cwm.modeling_cwm.CwmAttention": LlamaShape(window="module"),
        "gemma.modeling_gemma.GemmaAttention": LlamaShape(),
        "granite.modeling_granite.GraniteAttention": LlamaShape(),
        "granitemoe.modeling_granitemoe.GraniteMoeAttention": LlamaShape(),
        "granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedAttention": LlamaShape(),
        "lfm2.modeling_lfm2.Lfm2Attention": LlamaShape(norms=("q_layernorm", "k_layernorm")),
        "lfm2_moe.modeling_lfm2_moe.Lfm2MoeAttention": LlamaShape(norms=("q_layernorm", "k_layernorm")),
        "llama.modeling_llama.LlamaAttention": LlamaShape(),
        "ministral.modeling_ministral.MinistralAttention": LlamaShape(window="module"),
        "mistral.modeling_mistral.MistralAttention": LlamaShape(window="config"),
        "mixtral.modeling_mixtral.MixtralAttention": LlamaShape(window="config"),
        "phi3.modeling_phi3.Phi3Attention": LlamaShape(window="config"),
        "phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAttention": LlamaShape(window="config"),
        "phimoe.modeling_phimoe.PhimoeAttention": LlamaShape(),
        "qwen2.modeling_qwen2.Qwen2Attention": LlamaShape(window="module"),
        "qwen2_moe.modeling_qwen2_moe.Qwen2MoeAttention": LlamaShape(),
        "qwen3.modeling_qwen3.Qwen3Attention": LlamaShape(norms=_QK_NORM, window="module"),
        "qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention": LlamaShape(norms=_QK_NORM, window="module"),
        "smollm3.modeling_smollm3.SmolLM3Attention": LlamaShape(rope="use_rope", window="module"),
    }.items()
}


# The names that the forward of such an attention uses, beside those of its parts and of the attribute that says
# whether it has RoPE. One that uses another computes something else.
_FORWARD_NAMES = frozenset(
    "ALL_ATTENTION_FUNCTIONS _attn_implementation apply_rotary_pos_emb attention_dropout config contiguous "
    "eager_attention_forward get_interface getattr head_dim layer_idx reshape scaling shape sliding_window training "
    "transpose update view".split()
)
_FUSED_NAMES = frozenset({"num_attention_heads", "num_key_value_heads"})  # where one linear's output is cut


def parts_of(attention: nn.Module) -> tuple[str, ...]:
    """The names of an attention's linears and norms."""
    shape = shape_of(attention)
    return projections_of(type(attention)).names + (() if shape is None else shape.norms)


def _known_names(attention: nn.Module) -> frozenset[str]:
    shape, projections = shape_of(attention), projections_of(type(attention))
    found = _FORWARD_NAMES.union(parts_of(attention), [shape.rope] if shape.rope else ())
    return found if len(projections.inputs) == 3 else found | _FUSED_NAMES


def shape_of(attention: nn.Module) -> LlamaShape | None:
    """The data of a Llama-shaped attention, or None for an unknown class."""
    kind = type(attention)
    return SHAPES.get(f"{kind.__module__}.{kind.__qualname__}")


def why_generic(attention: nn.Module, layer: DeltaMemory, hooks: bool = True) -> str:
    """Why the fused forward does not apply to a layer, or "" if it does; ``hooks``: with hooks on its parts, too."""
    shape, kind = shape_of(attention), type(attention)
    if shape is None:
        return f"{kind.__name__} is not one of the attentions that the fused forward knows"
    for owner, name in bypassed_functions(attention):
        if _is_replaced(owner, name):
            return f"{getattr(owner, '__name__', owner)}.{name} was replaced"
    unknown = set(inspect.unwrap(kind.forward).__code__.co_names) - _known_names(attention)
    if unknown:
        return f"the forward of this version's {kind.__name__} uses {', '.join(sorted(unknown))}"
    projections, parameters = projections_of(kind), []
    for name in parts_of(attention):
        part = attention._modules.get(name)
        found = f"{type(part).__module__}.{type(part).__qualname__}"
        norm = f"{kind.__module__}.{kind.__name__.removesuffix('Attention')}RMSNorm"
        if type(part) is not nn.Linear if name in projections.names else found != norm:
            return f"{name} is a {found}"
        if is_distributed(part._parameters.get("weight")):
            return f"{name} is spread over processes"
        if "forward" in vars(part) or (hooks and (part._forward_hooks or part._forward_pre_hooks)):
            return f"{name} has hooks"
        weight = part._parameters.get("weight")
        if weight is None:
            return f"{name} has no weight of its own"
        if name in projections.names and tuple(weight.shape) != (part.out_features, part.in_features):
            return f"{name} has a weight of shape {list(weight.shape)}"
        parameters += [(f"{name}.{key}", value) for key, value in part._parameters.items() if value is not None]
    parameters += list(layer._parameters.items())
    first = parameters[0][1]
    if first.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the weights are {first.dtype}"
    for name, value in parameters:
        if type(value) is not nn.Parameter or type(value.data) is not torch.Tensor:
            return f"{name} is a {type(value).__name__} (sharded or quantised)"
        if value.device.type == "meta":
            return f"{name} is offloaded"
        if value.dtype != first.dtype or value.device != first.device:
            return f"{name} is {value.dtype} on {value.device}, {projections.inputs[0]} {first.dtype} on {first.device}"
    if len({getattr(attention, name).variance_epsilon for name in shape.norms}) > 1:
        return f"{' and '.join(shape.norms)} have different variance_epsilon"
    if attention.head_dim % 2:
        return f"a head of {attention.head_dim} numbers has no halves for RoPE"
    if first.shape[1] * first.element_size() % 64:
        # The backbone's own matmuls must give the same bits on a view: libraries look at the alignment.
        return f"a row of {first.shape[1]} {first.dtype} numbers is not a multiple of 64 bytes"
    if len({id(value) for _, value in parameters}) < len(parameters):
        return "two of its weights are one parameter"
    packed = layer.weights.ours() if layer.weights is not None else set()
    rows = [(name, value) for name, value in parameters if name.partition(".")[0] in projections.inputs]
    return next(filter(None, (why_unpackable(name, value, packed) for name, value in rows)), "")


def bypassed_functions(attention: nn.Module) -> list[tuple[object, str]]:
    """(owner, name) of each function that the attention's own forward runs through and the fused one does not."""
    shape, kind = shape_of(attention), type(attention)
    if shape is None:
        return []
    family = sys.modules[kind.__module__]
    found = [(kind, "forward"), (family, "apply_rotary_pos_emb"), (family, "rotate_half")]
    found += [(nn.Linear, "forward"), (nn.Linear, "__call__"), (nn.Module, "_call_impl"), (F, "linear")]
    if shape.norms and (norm := attention._modules.get(shape.norms[0])) is not None:
        found += [(type(norm), "forward"), (type(norm), "__call__")]
    return found


def _is_replaced(owner, name: str) -> bool:
    """Whether a function is another than the one that its library defines there."""
    function = getattr(owner, name, None)
    if owner is F:
        return function is not torch._C._nn.linear
    if isinstance(function, nn.Module):  # a kernel from the hub may take its place; until then it calls the function
        cells = getattr(type(function).forward, "__closure__", None) or ()
        inner = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, types.FunctionType)]
        if "forward" in vars(function) or len(inner) != 1:
            return True
        function = inner[0]
    if name in ("__call__", "_call_impl"):
        module = _modules  # every module's own
    else:
        module = owner if isinstance(owner, types.ModuleType) else sys.modules[owner.__module__]
    # The library's own decorators may be around it, nobody else's.
    while hasattr(function, "__wrapped__") and _library(function) in ("transformers", "torch"):
        function = function.__wrapped__
    return getattr(function, "__globals__", None) is not vars(module) or hasattr(function, "__wrapped__")


def _library(function) -> str:
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]


def why_unpackable(name: str, value, ours: set[int]) -> str:
    """Why a parameter cannot be given another storage, or ""; ``ours``: ids of those that have one of ours."""
    if type(value) is not nn.Parameter or type(value.data) is not torch.Tensor or value.device.type == "meta":
        return f"{name} is no plain parameter"
    if value.numel() == 0 or not (id(value) in ours or fills_its_storage(value.data)):
        return f"{name} is a view of a storage that others may use"
    if not can_pack(value.device):
        return f"{name} is on {value.device}, where rows of one tensor cannot have a storage each"
    return ""
