"""Fingerprints that tie a saved memory to the adapter and backbone it was made with.

A backbone's is made of the fields of its configuration that its hidden states depend on, and not of its weights: those
are gigabytes, and a fine-tuned backbone may go on with its memories. What does not change hidden states (vocabulary
size, token ids, dropout, the head, how long a context may be, …) may differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..config import DeltaMemConfig
from .layer import DeltaMemory

# Of every Llama-shaped decoder; further fields by model type. ``head_dim``, ``rope`` and the windows are worked out,
# because configurations spell them in several ways.
_LLAMA = tuple(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps".split()
)
_FIELDS = {
    "llama": (*_LLAMA, "attention_bias", "mlp_bias"),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": (*_LLAMA, "attention_bias"),
    "smollm3": (*_LLAMA, "attention_bias", "mlp_bias", "no_rope_layers"),
}

# Of every other type all fields count, except those that no hidden state at inference depends on.
_IRRELEVANT = frozenset(
    """
    architectures auto_map attn_implementation chunk_size_feed_forward dtype embd_pdrop attn_pdrop resid_pdrop
    final_logit_softcapping finetuning_task id2label init_std initializer_factor initializer_range label2id layerdrop
    drop_path_rate logit_scale logits_scaling max_window_layers no_rope_layer_interval num_labels
    num_nextn_predict_layers output_attentions output_hidden_states output_router_logits pretraining_tp problem_type
    quantization_config return_dict router_aux_loss_coef router_jitter_noise router_z_loss_coef sliding_window_pattern
    tie_encoder_decoder tie_word_embeddings torch_dtype transformers_version unsloth_version use_associative_scan
    use_cache use_mamba_kernels use_sliding_window vocab_size
    head_dim rope_parameters rope_scaling rope_theta partial_rotary_factor sliding_window layer_types
    max_position_embeddings original_max_position_embeddings
    """.split()
)  # the last ones are worked out
_IRRELEVANT_ENDS = ("_token_id", "_token_ids", "_token_index", "_dropout", "dropout_rate", "_dropout_prob")
# Kinds of layers that were renamed.
_KINDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
# Fields that some versions of transformers do not know yet, with what those versions compute.
_LATER = {"gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7}, "laguna": {"gating": True}}
# What Gemma 4's configuration has by layer, and had before for all layers with full attention.
_OF_A_LAYER = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
# RoPE of these types depends on how long a context may be.
_ROPE_BY_LENGTH = ("dynamic", "longrope", "yarn")

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots(?:[/\\]|$)")

# What the first format left out of its hash over the whole configuration.
_VOLATILE = frozenset(
    """
    _name_or_path _attn_implementation attn_implementation dtype torch_dtype transformers_version use_cache
    output_attentions output_hidden_states return_dict quantization_config _experts_implementation
    """.split()
)


def adapter_fingerprint(config: DeltaMemConfig, memories: dict[int, DeltaMemory]) -> str:
    """sha256 of the configuration and of every weight, rounded to bfloat16.

    The rounding makes it the same for one adapter under a float32 and a bfloat16 backbone.
    """
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for layer_idx, memory in sorted(memories.items()):
        for name, weight in sorted(memory.state_dict().items()):
            digest.update(f"{layer_idx}.{name}{list(weight.shape)}".encode())
            values = weight.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# --- the backbone


def backbone_fields(config) -> dict[str, Any]:
    """The fields of a backbone's configuration that its hidden states depend on, as JSON values.

    The same in every version of transformers: RoPE in one spelling, defaults filled in, whole floats as integers, None
    and False left out. Of a composite configuration (text and images), those of the text's decoder.
    """
    config = _text_config(config)
    values = config.to_dict()
    model_type = values.get("model_type")
    if model_type in _FIELDS and type(config).__module__.startswith("transformers.models."):
        fields = {name: values.get(name) for name in _FIELDS[model_type]}
    else:
        fields = {name: _without(value) for name, value in values.items() if _counts(name)}
        fields = {k: v for k, v in fields.items() if _plain(v) != _LATER.get(model_type, {}).get(k, ...)}
    heads, hidden, head_dim = (values.get(name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    if not head_dim and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        head_dim = hidden // heads
    fields |= {
        "model_type": model_type,
        "head_dim": head_dim,
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "rope": _rope(values),
        **_windows(values),
        **_global_layers(fields),
    }
    fields = {name: _plain(value) for name, value in sorted(fields.items())}
    return {name: value for name, value in fields.items() if value is not None and value is not False}


def backbone_fingerprint(fields: dict[str, Any]) -> str:
    """sha256 of ``backbone_fields``."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def first_backbone_fingerprint(config) -> str:
    """As the first format of the files has it: sha256 of all that two loads of a backbone should have in common."""
    values = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def differing_fields(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The fields that differ and both values, in words: ``hidden_size 64 (the model's: 128)``."""
    names = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    shown = [f"{name:.60} {_short(theirs.get(name))} (the model's: {_short(ours.get(name))})" for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _text_config(config):
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several: which one is not known
        return config


def _counts(name: str) -> bool:
    return not (name.startswith("_") or name in _IRRELEVANT or name.endswith(_IRRELEVANT_ENDS) or name == "dropout")


def _without(value):
    """A field's value; of a configuration within the configuration, what counts of it."""
    if isinstance(value, dict) and "model_type" in value:
        return {name: _without(part) for name, part in value.items() if name == "rope_parameters" or _counts(name)}
    if isinstance(value, list | tuple):
        return [_KINDS.get(part, part) if isinstance(part, str) else part for part in value]
    return value


def _global_layers(fields: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 4's layers with full attention have of their own, as versions without per_layer_config say it."""
    layers = fields.get("per_layer_config")
    if not isinstance(layers, dict) or "global_head_dim" in fields:
        return {}
    own = [layer for layer in layers.values() if layer]
    if not own or any(layer != own[0] or not layer.keys() <= _OF_A_LAYER.keys() for layer in own):
        return {}
    return {"per_layer_config": None} | {_OF_A_LAYER[name]: value for name, value in own[0].items()}


def _rope(values: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE's parameters in one spelling; by kind of layer where the kinds differ. None: the decoder has none."""
    found = values.get("rope_parameters") or values.get("rope_scaling") or {}
    top = {name: values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    kinds = {kind: parameters for kind, parameters in found.items() if isinstance(parameters, dict)}
    if kinds:  # what some versions leave beside them is not read
        made = {kind: _rope_of(parameters, top, values) for kind, parameters in kinds.items()}
        first = next(iter(made.values()))
        return first if all(parameters == first for parameters in made.values()) else made  # older versions have one
    if not found and top["rope_theta"] is None:
        return None
    return _rope_of(found, top, values)


def _rope_of(parameters: dict[str, Any], top: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    made = {name: value for name, value in (top | parameters).items() if value is not None}
    kind = made.pop("type", None)
    made["rope_type"] = made.get("rope_type", kind) or "default"
    if made.get("partial_rotary_factor") == 1:
        del made["partial_rotary_factor"]
    # With a factor of its own, yarn does not look at the length.
    if made["rope_type"] in _ROPE_BY_LENGTH and not (made["rope_type"] == "yarn" and made.get("factor")):
        made["max_position_embeddings"] = values.get("max_position_embeddings")
    return made


def _windows(values: dict[str, Any]) -> dict[str, Any]:
    """Kinds of layers and sliding windows: one value where all layers are alike."""
    kinds, window = values.get("layer_types"), values.get("sliding_window")
    if values.get("use_sliding_window") is False:
        window = None
    if not kinds:
        return {"sliding_window": window}
    # "full" says nothing that "no window" does not, and a window of None is full.
    kinds = [_KINDS.get(kind, kind) for kind in kinds]
    kinds = ["full_attention" if kind == "sliding_attention" and window is None else kind for kind in kinds]
    alike = len(set(kinds)) == 1
    return {
        "layer_types": None if alike and kinds[0] == "full_attention" else kinds[0] if alike else kinds,
        "sliding_window": window if any(kind != "full_attention" for kind in kinds) else None,
    }


def _plain(value):
    """A JSON value in which equal numbers look alike, whatever their type."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# --- names


def backbone_name(config) -> str:
    """A readable name: where the backbone came from (no path), or its architecture, and its size."""
    config, path = _text_config(config), getattr(config, "_name_or_path", "")
    name = public_name(path or getattr(config, "_name_or_path", "") or config.model_type)
    layers, hidden = getattr(config, "num_hidden_layers", "?"), getattr(config, "hidden_size", "?")
    return f"{name} ({config.model_type}, {layers} layers, hidden {hidden})"


def hub_id(name: str | os.PathLike | None) -> str | None:
    """The hub id (owner/name) that something was loaded by, from what was given for it; None if that was a path."""
    name = os.fspath(name or "")
    cached = _CACHED.search(name)
    if cached:  # a path into the hub's cache
        return f"{cached[1]}/{cached[2]}"
    return name if _ID.fullmatch(name) and not os.path.exists(name) else None  # too long a name is no path


def public_name(name: str | os.PathLike) -> str:
    """A hub id as it is, of a path the last part: where somebody keeps files is nobody else's business."""
    found, name = hub_id(name), os.fspath(name)
    if found is not None:
        return found
    if not re.search(r"[/\\]|^\.{1,2}$|^~", name):
        return name
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    if last not in ("", ".", "..", "~"):
        return last
    try:
        return Path(os.path.realpath(Path(name).expanduser())).name or "/"
    except (RuntimeError, ValueError):  # a home that nobody has, a NUL: somebody's file may say anything
        return last or "/"


def public_label(label: str) -> str:
    """``public_name`` of a stored name, which may go on with the backbone's size in brackets."""
    name, size = re.fullmatch(r"(.*?)( \(\S+, \S+ layers, hidden \S+\))?", label, re.DOTALL).groups()
    return public_name(name) + (size or "")
