"""patch_model and unpatch_model: one instance gets a memory, and gives it back."""

from __future__ import annotations

import inspect
import types

import torch
from torch import nn

from deltamem_kernels.dispatch import check_backend, operations, resolve_backend

from ..adapter.files import AdapterSource, canonical_name, read_adapter, stage_weights
from ..adapter.layer import DeltaMemory, LayerShape
from ..adapter.record import (
    RECORD,
    Identity,
    PatchRecord,
    decoder_of,
    find_record,
    record_disabled,
    record_of,
    spread_by,
    unwrap,
)
from ..config import DELTA_HEADS, DeltaMemConfig
from ..errors import ArgumentError, ArgumentTypeError, StateError, UnsupportedError
from ..memory.capture import current_capture
from ..memory.watch import current_record
from .attention import attention_forward
from .begin import CallersMemory, begin, composite_mask
from .cache import mark_missed, why_no_cache
from .checkpointing import enter, leave
from .files import install_files
from .finite import broken_rows, contain, give_back
from .forwards import cache_name, given_cache, why_not_handed_on
from .generation import generation_overrides
from .interrupted import begun, marking
from .update import MemoryCall
from .weights import LayerPath, LayerWeights, why_generic

MEMORY_ARGUMENTS = ("memory", "segment_ids", "token_mask")


def patch_model(model: nn.Module, adapter=None, *, backend: str = "auto") -> nn.Module:
    """Give a decoder from transformers a δ-mem memory; returns the same model.

    Args:
        model: Qwen3, SmolLM3, or any decoder whose attention has ``q_proj`` and ``o_proj``.
        adapter: a directory or hub id (released format or ours), a DeltaMemConfig (fresh parameters), or None =
            ``DeltaMemConfig()``, the released recipe.
        backend: ``auto`` (Triton on a GPU, numba on a CPU if installed, else the reference), ``triton``,
            ``numba`` or ``reference``.

    Patch the model that you call: ``generate`` and ``save_pretrained`` of a model around a patched decoder know
    nothing of the memory. PEFT's wrapper does: its ``save_pretrained`` writes the adapter beside PEFT's (one that was
    put around a patched model not if it is given ``state_dict=``).

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
    device = _device_of(next(iter(attentions.values())))
    if device.type != "meta":
        resolve_backend(backend, device.type)
        # Imported now: what fails does so here, and not in the middle of a forward.
        operations(backend, device)
    _refuse_sharded(model)
    memories = _build_memories(model, attentions, source, backend)
    identity = Identity({m.layer_idx: m for m in memories.values()}, source.config, model.config, source.name)
    record = PatchRecord(identity, decoder, attentions, cache_name=cache_name(type(decoder).forward))
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


def _is_linear(module) -> bool:
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")


def _find_attentions(model: nn.Module, config: DeltaMemConfig) -> dict[str, nn.Module]:
    """Attention modules by name; raises if there is none or a target layer does not exist."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name.split(".")[-1] in config.target_modules
        and _is_linear(getattr(module, "q_proj", None))
        and _is_linear(getattr(module, "o_proj", None))
        and getattr(module, "layer_idx", None) is not None
    }
    if not found:
        raise ArgumentError(
            f"model: {type(model).__name__} has no attention named {' or '.join(config.target_modules)} with q_proj "
            "and o_proj, which the adapter corrects"
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
            if not _is_linear(getattr(module, f"{head}_proj", None)):
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
    if "forward" in vars(attention) and not hasattr(attention, "_hf_hook"):
        raise ArgumentError(f"model: {name} has a forward of its own set on the instance; undo that before patching")


def _refuse_sharded(model: nn.Module) -> None:
    if getattr(model, "tp_size", None) not in (None, 1) or getattr(model, "_tp_size", None) not in (None, 1):
        raise ArgumentError("model: sharded by tensor parallelism, which is not supported yet; load it without tp_plan")


def _shape_of(attention: nn.Module) -> LayerShape:
    def out(head: str) -> int:
        projection = getattr(attention, f"{head}_proj", None)
        return projection.out_features if _is_linear(projection) else 0

    return LayerShape(attention.q_proj.in_features, out("q"), out("k"), out("v"), out("o"))


def _build_memories(model: nn.Module, attentions, source: AdapterSource, backend: str) -> dict[str, DeltaMemory]:
    def build(attention: nn.Module, device: torch.device) -> DeltaMemory:
        dtype = computing_dtype(model, attention.q_proj.weight)
        return DeltaMemory(
            source.config, _shape_of(attention), attention.layer_idx, backend, device=device, dtype=dtype
        )

    staged = None
    if source.directory is not None:
        # All of the adapter is read and compared before anything is allocated for it.
        staged = stage_weights({n: build(a, torch.device("meta")) for n, a in attentions.items()}, source)
    memories = {}
    for name, attention in attentions.items():
        memory = build(attention, _device_of(attention))
        if staged is None:
            base = {head: getattr(getattr(attention, f"{head}_proj", None), "weight", None) for head in DELTA_HEADS}
            if source.config.output_init.startswith("base_slice"):
                _refuse_unreadable(name, base, source.config)
            memory.reset_parameters(base)
        else:
            with torch.no_grad():
                for key, parameter in memory.named_parameters():
                    parameter.copy_(staged[canonical_name(f"{name}.{key}")])
        memories[name] = memory
    return memories


def _device_of(attention: nn.Module) -> torch.device:
    """Where a layer computes: its weight's device, or what accelerate's offloading moves it to."""
    device = attention.q_proj.weight.device
    hook = getattr(attention.q_proj, "_hf_hook", None)
    target = getattr(hook, "execution_device", None)
    return torch.device(target) if device.type == "meta" and target is not None else device


def computing_dtype(model: nn.Module, weight: torch.Tensor) -> torch.dtype:
    """The dtype that a layer computes in: its weight's, or the model's where that is quantised."""
    if _is_plain(weight):
        return weight.dtype
    return next(p.dtype for p in model.parameters() if _is_plain(p))


def _is_plain(weight: torch.Tensor) -> bool:
    # float8 counts as quantised: nothing is computed in it
    return weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def _refuse_unreadable(name: str, base: dict[str, torch.Tensor | None], config: DeltaMemConfig) -> None:
    for head in config.delta_heads:
        if base[head].device.type == "meta":
            raise ArgumentError(
                f"output_init: got {config.output_init!r}, but the weight of {name}.{head}_proj is offloaded; allowed "
                "there: zero, random, or an adapter with weights"
            )
        if not _is_plain(base[head]):
            raise ArgumentError(
                f"output_init: got {config.output_init!r}, but {name}.{head}_proj is quantised ({base[head].dtype}); "
                "allowed there: zero, random, or an adapter with weights"
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
    decoder = record.decoder
    for part in (decoder, model):
        record.positional[type(part)] = type(part).forward, _positional(type(part).forward) or ()
    record.originals["decoder"] = vars(decoder).get("forward")
    record.replace(decoder, RECORD, record)
    record.replace(decoder, "forward", types.MethodType(_with_signature(decoder, _decoder_forward), decoder))
    record.replace(decoder, "_call_impl", types.MethodType(_call, decoder))
    if model is not decoder:
        # Such a model, of images and text, may prepare the masks itself; its decoder cannot tell which tokens are real.
        record.composite = getattr(model, getattr(model, "base_model_prefix", ""), decoder) is not decoder
        record.originals["outer"] = vars(model).get("forward")
        record.replace(model, RECORD, record)
        record.replace(model, "forward", types.MethodType(_with_signature(model, _outer_forward), model))
        record.replace(model, "_call_impl", types.MethodType(_call, model))
    for name, function in generation_overrides(model).items():
        record.originals[name] = vars(model).get(name)
        record.replace(model, name, types.MethodType(function, model))
    saved = "base_model_prepare_inputs_for_generation"
    if outer is not model and saved in vars(outer):
        # PEFT's wrapper with virtual tokens calls this in its own, and puts it back on the model afterwards.
        record.replace(outer, saved, model.prepare_inputs_for_generation)
    if hasattr(model, "save_pretrained"):
        # accelerate must not move a caller's memory: it would write to the copy.
        skipped = list(getattr(model, "_skip_keys_device_placement", None) or [])
        record.replace(model, "_skip_keys_device_placement", [*skipped, "memory"])
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


def _with_signature(module: nn.Module, function):
    """A copy of ``function`` whose signature is the module's own and the memory's arguments (generate reads it)."""
    copied = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__doc__ = type(module).forward.__doc__
    original = inspect.signature(module.forward)
    own = [p for p in original.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in original.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in MEMORY_ARGUMENTS
        if name not in original.parameters
    ]
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    copied.__signature__ = inspect.Signature([self_parameter, *own, *extra, *rest])
    return copied


def _call(self, *args, **kwargs):
    """What ``model(...)`` runs, forward and hooks."""
    record = self._delta_memory_patch
    outermost = self is not record.decoder or "outer" not in record.originals
    return marking(record, type(self)._call_impl, (self, *args), kwargs, anew=outermost)


def _outer_forward(self, *args, memory=None, segment_ids=None, token_mask=None, **kwargs):
    record = self._delta_memory_patch
    if memory is not None:
        # Hooks that move arguments between devices would copy it, and the copy would be written.
        kwargs["memory"] = CallersMemory(memory)
    if segment_ids is not None:
        kwargs["segment_ids"] = segment_ids
    named = dict(zip(_positional_of(record, self), args)) | kwargs if args else kwargs
    if token_mask is None and record.composite and not record_disabled(record):
        token_mask = composite_mask(named)
    if token_mask is not None:
        kwargs["token_mask"] = token_mask
    own = record.originals["outer"]
    if own is None:
        return marking(record, type(self).forward, (self, *args), kwargs)
    return marking(record, own, args, kwargs)


def _decoder_forward(self, *args, memory=None, segment_ids=None, token_mask=None, **kwargs):
    record = self._delta_memory_patch
    own = record.originals["decoder"]
    if isinstance(memory, CallersMemory):
        memory = memory.state
    if args:
        kwargs.update(_by_name(record, self, args, kwargs))
    name = record.cache_name
    if record_disabled(record):
        mark_missed(given_cache(kwargs))
        return type(self).forward(self, **kwargs) if own is None else own(**kwargs)
    if name not in kwargs and "past_key_values" in kwargs:
        name = "past_key_values"  # newer versions take this one too, and warn of it themselves
    call = begin(self, record.identity, kwargs, memory, segment_ids, token_mask, name)
    begun(call)
    try:
        return _with_memory(self, record, call, kwargs)
    except BaseException as error:
        call.cut_short(error, call.state)
        raise


def _with_memory(self, record: PatchRecord, call: MemoryCall, kwargs: dict):
    """The decoder's own forward, its layers with ``call``."""
    own = record.originals["decoder"]
    finite = contain(self, call, kwargs)
    if not call.in_place:
        enter(self, call, kwargs)
    output = type(self).forward(self, **kwargs, memory=call) if own is None else own(**kwargs, memory=call)
    if len(call.initial) != len(record.identity.memories):
        missing = sorted(set(record.identity.memories) - set(call.initial))
        raise StateError(
            f"model: the attention of layers {missing} ran without its memory: {type(self).__name__} does not hand "
            "keyword arguments down to it, so it cannot be patched"
        )
    if not call.in_place:
        output = leave(call, output)
    if finite is not None:
        output = give_back(call, output, finite)
    if call.gates is not None:
        current_record().add(call.gates)
        call.gates.clear()
    if call.projections is not None:
        current_capture().append(call.projections)
    if not call.in_place:
        # Recomputations hold the call, and the state's graph holds them: nobody would ever free that circle.
        call.state = None
    return output


def _by_name(record: PatchRecord, module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Positional arguments of a forward by name."""
    names = _positional_of(record, module)
    if len(args) > len(names):
        raise ArgumentTypeError(
            f"{type(module).__name__}.forward: got {len(args)} positional arguments, allowed {len(names)}"
        )
    named = dict(zip(names, args))
    for name in named:
        if name in kwargs:
            raise ArgumentTypeError(f"{type(module).__name__}.forward: got {name} twice")
    return named


def _positional_of(record: PatchRecord, module: nn.Module) -> tuple[str, ...]:
    """The names of what a patched module's forward takes by position."""
    forward, names = record.positional[type(module)]
    if type(module).forward is forward:
        return names
    # It was replaced since; of a wrapper (*args, **kwargs) only the one from before knows.
    now = _positional(type(module).forward)
    return names if now is None else now


def _positional(forward) -> tuple[str, ...] | None:
    """The arguments of a function that may be given by position, without self; None: any."""
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional)[1:]
