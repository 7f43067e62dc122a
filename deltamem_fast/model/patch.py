"""patch_model and unpatch_model: one instance gets a memory, and gives it back."""

from __future__ import annotations

import inspect
import types

import torch
from torch import nn

from deltamem_kernels.dispatch import check_backend, operations, resolve_backend

from ..adapter.files import AdapterSource, canonical_name, read_adapter, stage_weights
from ..adapter.guard import Guard, guarding
from ..adapter.identity import Identity
from ..adapter.layer import DeltaMemory
from ..adapter.record import PatchRecord, find_record, record_of
from ..adapter.wrappers import RECORD, computing_device, decoder_of, spread_by, unwrap
from ..config import DELTA_HEADS, DeltaMemConfig
from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError
from .attention import attention_forward
from .cache import why_no_cache
from .checkpointing import is_sharded
from .families import why_generic
from .files import install_files
from .finite import broken_rows
from .generation import generation_overrides
from .patched_forward import decoder_forward, outer_forward, patched_call, positional_names, with_signature
from .projections import ProjectionRows, query_linear, rows_of
from .signatures import cache_name, why_not_handed_on
from .tensor_parallel import group_of, is_distributed, of_the_first, why_unknown
from .weights import LayerPath, LayerWeights


def patch_model(
    model: nn.Module, adapter=None, *, backend: str = "auto", guard: Guard | bool | str = "auto"
) -> nn.Module:
    """Give a decoder from transformers a δ-mem memory; returns the same model.

    Args:
        model: Qwen3, SmolLM3, or any decoder whose attention has ``q_proj`` and ``o_proj``, or others that are known
            (``projections.OTHERS``). docs/backbones.md has the list.
        adapter: a directory or hub id (released format or ours), the name of a shipped one (``smollm2/msw``), a
            DeltaMemConfig (fresh parameters), or None = ``DeltaMemConfig()``, the released recipe.
        backend: ``auto`` (Triton on a GPU, numba on a CPU if installed, else the reference), ``triton``,
            ``numba`` or ``reference``.
        guard: which forwards hold their gates and values, so that no text can make a state larger than a bound (see
            ``Guard``): ``auto``, those that are given less than whole ``trust``; True, all; False, none; or a Guard,
            all with its bounds.

    Patch the model that you call: ``generate`` and ``save_pretrained`` of a model around a patched decoder know
    nothing of the memory. PEFT's wrapper does: its ``save_pretrained`` writes the adapter beside PEFT's (one that was
    put around a patched model not if it is given ``state_dict=``).

    Of a model that tensor parallelism has spread over processes each has to call it, with the same ``adapter``.

    Raises:
        ValueError: the model is patched already, has no such attention, the adapter does not fit it, or the
            backend cannot run; the message names both sides and the model is as it was.
        TypeError: ``adapter`` is of another type.
        FileNotFoundError: ``adapter`` names a directory without an adapter.
    """
    outer, model = model, unwrap(model)
    _check_model(outer, model)
    if (record := find_record(model)) is not None:
        raise ArgumentError(
            f"model: already patched with {record.identity.adapter_name}; call unpatch_model before another adapter"
        )
    check_backend(backend)
    source = read_adapter(adapter)
    decoder = decoder_of(model)
    attentions = _find_attentions(model, source.config)
    guarded = guarding(guard, source.config.rule)
    device = computing_device(query_linear(next(iter(attentions.values()))))
    if device.type != "meta":
        resolve_backend(backend, device.type)
        # Imported now: what fails does so here, and not in the middle of a forward.
        operations(backend, device)
    memories = _build_memories(model, attentions, source, backend)
    identity = Identity({m.layer_idx: m for m in memories.values()}, source.config, model.config, source.name)
    record = PatchRecord(identity, decoder, attentions, cache_name=cache_name(type(decoder).forward), guarding=guarded)
    try:
        _install(outer, model, record, memories)
    except BaseException:
        _uninstall(model, record)
        raise
    return outer


def unpatch_model(model: nn.Module) -> nn.Module:
    """Take the memory off again; logits and state_dict keys are what they were before. Returns the same model.

    Raises:
        ValueError: the model is not patched.
    """
    inner = unwrap(model)
    _uninstall(inner, record_of(inner))
    return model


# --- finding


_NO_PEFT = {
    "PREFIX_TUNING": "fills the cache with keys and values of its own, which no memory has read",
    "CARTRIDGE": "fills the cache with keys and values of its own, which no memory has read",
    "ADAPTION_PROMPT": "puts a module of its own in the attention's place, past which the memory could not be handed",
}


def _check_model(outer: nn.Module, model: nn.Module) -> None:
    """Raise for what has no decoder of transformers in it, or would not see the parameters that come to it."""
    if around := spread_by(outer):
        raise ArgumentError(
            f"model: got a {around}, allowed the model in it: patch that, then wrap it anew; the wrapper "
            "would not see the memory's parameters"
        )
    kind = getattr(getattr(getattr(outer, "active_peft_config", None), "peft_type", None), "value", None)
    if kind in _NO_PEFT:
        raise UnsupportedError(f"model: PEFT's {kind} {_NO_PEFT[kind]}; not supported")
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise ArgumentTypeError(
            f"model: got a {type(model).__name__}, allowed a model of transformers (or one in PEFT's or "
            "torch.compile's wrapper); if one is in it, patch that one"
        )
    if getattr(model, "_tp_size", None) not in (None, 1) and not any(map(is_distributed, model.parameters())):
        raise UnsupportedError(
            "model: sharded by tensor parallelism into plain tensors (transformers before 5.17), of which nothing says "
            "what rows they are; not supported. Take a newer transformers, or load it without tp_plan"
        )


def _find_attentions(model: nn.Module, config: DeltaMemConfig) -> dict[str, nn.Module]:
    """Attention modules by name; raises if there is none or a target layer does not exist."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name.split(".")[-1] in config.target_modules
        and getattr(module, "layer_idx", None) is not None
        and {"q", "o"} <= rows_of(module).keys()
    }
    if not found:
        raise ArgumentError(
            f"model: {type(model).__name__} has no attention named {' or '.join(config.target_modules)} with q_proj "
            "and o_proj (or others that are known by its class), which the adapter corrects"
        )
    indices = [module.layer_idx for module in found.values()]
    if len(set(indices)) != len(indices):
        raise ArgumentError(f"model: {type(model).__name__} has several attentions with one layer index: {indices}")
    for name, module in found.items():
        _check_attention(model, name, module)
    missing = sorted(set(config.target_layers) - set(indices))
    if missing:
        raise ArgumentError(
            f"target_layers: the adapter names layers {missing}, the model has {min(indices)} to {max(indices)}"
        )
    if config.target_layers:
        found = {name: module for name, module in found.items() if module.layer_idx in config.target_layers}
    decoder, indices = decoder_of(model), [module.layer_idx for module in found.values()]
    reason = why_not_handed_on(type(decoder).forward) or why_no_cache(decoder, indices)
    if reason:
        raise UnsupportedError(f"model: {type(decoder).__name__} {reason}; such models are not supported")
    for name, module in found.items():
        for head in config.delta_heads:
            if head not in rows_of(module):
                raise ArgumentError(f"delta_heads: the adapter corrects {head}, but {name} has no {head}_proj")
    return found


def _check_attention(model: nn.Module, name: str, attention: nn.Module) -> None:
    """Raise if the memory could not reach this attention, or would go past somebody's own forward."""
    layer = model.get_submodule(name.rpartition(".")[0])
    for part, module in ((name.rpartition(".")[0], layer), (name, attention)):
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "place_submodules", False) and getattr(hook, "offload", False):
            raise ArgumentError(
                f"model: {part} is offloaded with all that is in it (preload_module_classes), so a memory that came to "
                "it would not be loaded; allowed without preload_module_classes"
            )
    for part, module in (("decoder layer", layer), ("attention", attention)):
        kinds = [p.kind for p in inspect.signature(type(module).forward).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ArgumentError(
                f"model: the {part} {type(module).__name__} takes no keyword arguments beyond its own, so the memory "
                f"cannot be handed to {name}; such models are not supported"
            )
    reason = why_not_handed_on(type(layer).forward, name.rpartition(".")[2])
    if reason:
        raise UnsupportedError(
            f"model: the decoder layer {type(layer).__name__} {reason}, so the memory cannot be handed to {name}; such "
            "models are not supported"
        )
    for part in rows_of(attention).values():
        if (reason := why_unknown(part.linear_weight)) and not is_sharded(model):  # FSDP gathers it for the forward
            raise UnsupportedError(
                f"model: {name}.{part.name} {reason}, so that it cannot be told which rows are here; allowed: rows or "
                "columns over one dimension; not supported"
            )
    if "forward" in vars(attention) and not hasattr(attention, "_hf_hook"):
        raise ArgumentError(f"model: {name} has a forward of its own set on the instance; undo that before patching")


def _build_memories(model: nn.Module, attentions, source: AdapterSource, backend: str) -> dict[str, DeltaMemory]:
    def build(attention: nn.Module, device: torch.device) -> DeltaMemory:
        query, rows = query_linear(attention), rows_of(attention)
        sizes = {head: rows[head].size if head in rows else 0 for head in DELTA_HEADS}
        place = {"device": device, "dtype": computing_dtype(model, query.weight)}
        return DeltaMemory(source.config, query.in_features, sizes, attention.layer_idx, backend, **place)

    staged = None
    if source.directory is not None:
        # All of the adapter is read and compared before anything is allocated for it.
        staged = stage_weights({n: build(a, torch.device("meta")) for n, a in attentions.items()}, source)
    memories = {}
    for name, attention in attentions.items():
        memory = build(attention, computing_device(query_linear(attention)))
        if staged is None:
            rows, base = rows_of(attention), {}
            if source.config.output_init.startswith("base_slice"):
                _refuse_unreadable(name, rows, source.config)
                base = {head: rows[head].weight for head in source.config.delta_heads}
            memory.reset_parameters(base)
            if (group := group_of(part.linear_weight for part in rows.values())) is not None:
                of_the_first(memory.parameters(), group)
        else:
            with torch.no_grad():
                for key, parameter in memory.named_parameters():
                    parameter.copy_(staged[canonical_name(f"{name}.{key}")])
        memories[name] = memory
    return memories


def computing_dtype(model: nn.Module, weight: torch.Tensor) -> torch.dtype:
    """The dtype that a layer computes in: its weight's, or the model's where that is quantised."""
    if _is_plain(weight):
        return weight.dtype
    return next(p.dtype for p in model.parameters() if _is_plain(p))


def _is_plain(weight: torch.Tensor) -> bool:
    # float8 counts as quantised: nothing is computed in it
    return weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def _refuse_unreadable(name: str, rows: dict[str, ProjectionRows], config: DeltaMemConfig) -> None:
    for head in config.delta_heads:
        part, weight = f"{name}.{rows[head].name}", rows[head].linear_weight
        if weight is None:
            reason = f"{part} has no weight"
        elif weight.device.type == "meta":
            reason = f"the weight of {part} is offloaded"
        elif not _is_plain(weight):
            reason = f"{part} is quantised ({weight.dtype})"
        else:
            continue
        raise ArgumentError(
            f"output_init: got {config.output_init!r}, but {reason}; allowed there: zero, random, or an adapter with "
            "weights"
        )


# --- installing


def _install(outer: nn.Module, model: nn.Module, record: PatchRecord, memories: dict[str, DeltaMemory]) -> None:
    for name, attention in record.attentions.items():
        attention.add_module("delta_memory", memories[name])
        # Under accelerate's hook, which loads what it has offloaded of the attention itself.
        place = "_old_forward" if "_old_forward" in vars(attention) else "forward"
        record.replace(attention, place, types.MethodType(attention_forward, attention))
        record.replace(attention, "_apply", types.MethodType(_apply, attention))
        record.hooks.append(attention.register_load_state_dict_pre_hook(_before_loading))
        record.hooks.append(attention.register_load_state_dict_post_hook(_after_loading))
        memories[name].weights = LayerWeights()
    record.pack()
    decoder, parts = record.decoder, [("decoder", record.decoder, decoder_forward)]
    if model is not decoder:
        parts.append(("outer", model, outer_forward))
        # Such a model, of images and text, may prepare the masks itself; its decoder cannot tell which tokens are real.
        record.composite = getattr(model, getattr(model, "base_model_prefix", ""), decoder) is not decoder
    for key, part, forward in parts:
        record.positional[type(part)] = type(part).forward, positional_names(type(part).forward) or ()
        record.replace(part, RECORD, record)
        record.override(part, "forward", with_signature(part, forward), key)
        record.replace(part, "_call_impl", types.MethodType(patched_call, part))
    for name, function in generation_overrides(model).items():
        record.override(model, name, function)
    saved = "base_model_prepare_inputs_for_generation"
    if outer is not model and saved in vars(outer):
        # PEFT's wrapper with virtual tokens calls this in its own, and puts it back on the model afterwards.
        record.replace(outer, saved, model.prepare_inputs_for_generation)
    if hasattr(model, "save_pretrained"):
        # accelerate must not move a caller's memory: it would write to the copy.
        record.extend(model, "_skip_keys_device_placement", ["memory"])
    install_files(outer, model, record)
    record.broken_embeddings = broken_rows(decoder) is not None


def _uninstall(model: nn.Module, record: PatchRecord) -> None:
    record.restore()
    for attention in record.attentions.values():
        if "delta_memory" in attention._modules:
            if attention.delta_memory.weights is not None:
                attention.delta_memory.weights.release()
            del attention._modules["delta_memory"]


def _apply(self, function, recurse=True):
    """``nn.Module._apply`` of a patched attention (``.to()`` and its like); then the weights are packed again."""
    weights = self.delta_memory.weights
    known = weights.let_go()
    try:
        type(self)._apply(self, function, recurse)
    except BaseException:
        weights.know(known)
        raise
    weights.refresh(self, self.delta_memory)
    return self


def _before_loading(module: nn.Module, *_) -> None:
    module.delta_memory.weights.let_go()


def _after_loading(module: nn.Module, _) -> None:
    """After ``load_state_dict``, which may have put other parameters in the old ones' places (assign=True)."""
    module.delta_memory.loads += 1
    module.delta_memory.weights.refresh(module, module.delta_memory)


def layer_paths(model: nn.Module) -> dict[int, LayerPath]:
    """How each layer of a patched model runs where nothing is differentiated: layer index → LayerPath.

    Under autograd or autocast every layer takes the generic path.

    Raises:
        ValueError: the model is not patched.
    """
    found = {}
    for attention in record_of(unwrap(model)).attentions.values():
        memory = attention.delta_memory
        with torch.no_grad():
            memory.weights.usable(attention, memory)  # looks at what has changed since
        reason = memory.weights.reason or why_generic(attention, memory)
        found[memory.layer_idx] = LayerPath("generic" if reason else "fast", reason)
    return dict(sorted(found.items()))
