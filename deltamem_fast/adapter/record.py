"""What is known of a patched model: its memory's identity, and how to undo the patch."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import json
import logging
import os
import secrets
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltamem_kernels.rule import DeltaRule

from ..arguments import shown
from ..config import DeltaMemConfig
from ..errors import ArgumentError, ArgumentTypeError
from .fingerprints import (
    adapter_fingerprint,
    backbone_fields,
    backbone_fingerprint,
    backbone_name,
    differing_fields,
    first_backbone_fingerprint,
    public_label,
    public_name,
)
from .layer import DeltaMemory, refuse_pickling

logger = logging.getLogger("deltamem_fast")
RECORD = "_delta_memory_patch"
_disabled: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("deltamem_disabled", default=frozenset())


@dataclass(frozen=True)
class LayerSpec:
    """Shape and place of one layer's state."""

    heads: int
    rank: int
    device: torch.device

    @classmethod
    def of(cls, rule: DeltaRule, device: torch.device) -> LayerSpec:
        return cls(rule.heads, rule.rank, device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one conversation's state."""
        return self.heads, self.rank, self.rank

    def zeros(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, *self.shape, dtype=torch.float32, device=self.device)


def new_token() -> str:
    """A name that nobody else has, for an ``Identity``."""
    return secrets.token_hex(8)


@dataclass(eq=False)
class Identity:
    """Which adapter on which backbone a memory belongs to; outlives the model."""

    memories: dict[int, DeltaMemory]
    config: DeltaMemConfig
    backbone_config: Any
    adapter_name: str
    kept_fingerprints: dict[str, str] | None = None
    # Pickles carry it: a copy belongs to the adapter that it was made with, also when that was trained meanwhile.
    token: str = field(default_factory=new_token)
    accepted: list[Identity] = field(default_factory=list)

    def layer_specs(self) -> dict[int, LayerSpec]:
        """Layer index → shape and device of its state."""
        return {i: LayerSpec.of(m.rule, m._parameters["memory_q_proj"].device) for i, m in self.memories.items()}

    def __post_init__(self):
        self.adapter_name = public_name(self.adapter_name)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints and readable names of adapter and backbone, as a saved memory holds them.

        ``backbone_fields`` is JSON. ``backbone_fingerprint_1`` is what the first format of the files has for
        ``backbone_fingerprint``.
        """
        if self.kept_fingerprints is not None:
            return self.kept_fingerprints
        fields = backbone_fields(self.backbone_config)
        return {
            "adapter_fingerprint": adapter_fingerprint(self.config, self.memories),
            "adapter_name": self.adapter_name,
            "backbone_fields": json.dumps(fields),
            "backbone_fingerprint": backbone_fingerprint(fields),
            "backbone_fingerprint_1": first_backbone_fingerprint(self.backbone_config),
            "backbone_name": backbone_name(self.backbone_config),
        }

    def described(self) -> str | None:
        """The fingerprints as JSON, for a pickle, which ``fingerprinted`` reads; None where they cannot be told.

        Sharded weights are in several processes, those on meta nowhere.
        """
        weights = [weight for memory in self.memories.values() for weight in memory.parameters()]
        if any(type(weight.data) is not torch.Tensor or weight.is_meta for weight in weights):
            return None
        try:
            return json.dumps(self.fingerprints() | {"token": self.token})
        except RuntimeError:  # in a forked process, which cannot read what lies on a GPU
            return None

    def check(self, other: Identity | None) -> None:
        """Raise ValueError if a memory of ``other`` was made with another adapter or backbone; names both."""
        if other is None or other.token == self.token or any(other is known for known in self.accepted):
            return
        difference = describe_difference(other.fingerprints(), self.fingerprints())
        if difference:
            raise ArgumentError(f"memory: made under {difference}")
        if self.memories:  # one that is known by its fingerprints alone lives on, and must hold no model's weights
            self.accepted.append(other)


@functools.lru_cache(maxsize=256)
def fingerprinted(fingerprints: str) -> Identity:
    """The identity of an adapter that is not here, by ``described`` of it; one object for each."""
    values = json.loads(fingerprints)
    token = values.pop("token")
    return Identity({}, DeltaMemConfig(), None, values["adapter_name"], kept_fingerprints=values, token=token)


def describe_difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """What differs between the fingerprints of a memory and of a model, both named; "" if nothing.

    Args:
        theirs: as a file has them; of the first format too.
        ours: of ``Identity.fingerprints``.
    """
    for part in ("backbone", "adapter"):
        found = theirs.get(f"{part}_fingerprint")
        known = [ours[f"{part}_fingerprint"]]
        if "backbone_fields" not in theirs:
            known.append(ours.get(f"{part}_fingerprint_1"))
        if isinstance(found, str) and found in known:
            continue
        them = f"{public_label(str(theirs.get(f'{part}_name'))):.200} ({str(found or '?')[:12]})"
        us = f"{ours[f'{part}_name']} ({ours[f'{part}_fingerprint'][:12]})"
        return f"{part} {them}, but the model's {part} is {us}" + _reason(part, theirs, ours)
    return ""


def _reason(part: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Which fields of the backbones differ, as far as the file says."""
    if part != "backbone":
        return ""
    try:
        fields = json.loads(theirs["backbone_fields"])
        difference = differing_fields(fields, json.loads(ours["backbone_fields"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return "; the file has no fields of its backbone, only a fingerprint, so that it cannot say which differ"
    return f"; they differ in {difference}" if difference else ""


@dataclass(eq=False)
class PatchRecord:
    """What patch_model changed on one model, and how to change it back."""

    identity: Identity
    decoder: nn.Module
    attentions: dict[str, nn.Module]
    replaced: list[tuple[Any, str, Any, bool, Any]] = field(default_factory=list)
    # Methods that stood on the instance before; None: the class's, looked up at each call (it may be replaced).
    originals: dict[str, Any] = field(default_factory=dict)
    # By class: its forward when it was patched, and the names of what that takes by position.
    positional: dict[type, tuple[Any, tuple[str, ...]]] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    # What the decoder and the model call the cache. Here it is past_key_values, whatever the version.
    cache_name: str = "past_key_values"
    composite: bool = False
    # Whether the table of embeddings had a row that is not finite when it was last looked at.
    broken_embeddings: bool = False
    disabled_depth: int = 0

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute and remember what was there."""
        present = name in vars(owner)
        self.replaced.append((owner, name, value, present, vars(owner).get(name)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Undo every ``replace``, last first.

        Raises:
            ValueError: something else was put in a replaced attribute's place since; nothing is undone.
        """
        for owner, name, value, _, old in self.replaced:
            if _place_of(owner, name, value) is None and not _went_with_its_hook(owner, old):
                raise ArgumentError(
                    f"model: {type(owner).__name__}.{name} was replaced after patch_model (by a hook, or another "
                    "patch); undo that first"
                )
        while self.hooks:
            self.hooks.pop().remove()
        while self.replaced:
            owner, name, value, present, old = self.replaced.pop()
            place = _place_of(owner, name, value)
            if place is not None:
                _put_back(owner, name, place, present, old)

    def __deepcopy__(self, memo) -> PatchRecord:
        copied = PatchRecord.__new__(PatchRecord)
        memo[id(self)] = copied
        for name, value in vars(self).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        copied.identity.token = new_token()  # its weights go their own way
        copied.pack()
        return copied

    def pack(self) -> None:
        """Choose each layer's path and pack its weights; again where they have moved."""
        for attention in self.attentions.values():
            attention.delta_memory.weights.refresh(attention, attention.delta_memory)
        if torch.cuda.is_initialized():
            # The separate weights' blocks are too small for the next layer's packed ones; others may want the room.
            torch.cuda.empty_cache()

    def __reduce_ex__(self, protocol):
        refuse_pickling()


# What accelerate keeps a forward under that it has put one of its own on: its hooks' (dispatch_model, cpu_offload) goes
# on calling what stands there, its mixed precision's holds it fast.
_HOOKED, _AUTOCAST = "_old_forward", "_original_forward"


def _place_of(owner: Any, name: str, value: Any) -> str | None:
    """The attribute of ``owner`` that holds ``value`` now, which was put under ``name``; None: it is gone."""
    places = ("forward", _HOOKED, _AUTOCAST) if name in ("forward", _HOOKED) else (name,)
    found = vars(owner)
    return next((place for place in places if _same(found.get(place), value)), None)


def _same(found: Any, value: Any) -> bool:
    # accelerate's unwrap_model binds the method anew.
    return found is value or (isinstance(found, types.MethodType) and found == value)


def _went_with_its_hook(owner: Any, old: Any) -> bool:
    """Whether ``old`` was accelerate's forward, and its hooks are gone, whose removal sets the class's own."""
    return isinstance(old, functools.partial) and "_hf_hook" not in vars(owner) and _HOOKED not in vars(owner)


def _put_back(owner: Any, name: str, place: str, present: bool, old: Any) -> None:
    if place == _HOOKED:
        setattr(owner, place, old if present else types.MethodType(type(owner).forward, owner))
        return
    if place == _AUTOCAST:
        logger.warning(
            "unpatch_model: accelerate's mixed precision lay around the patched forward of %s and is taken off with it",
            type(owner).__name__,
        )
        delattr(owner, _AUTOCAST)
        place = "forward"
    if present and not (name == _HOOKED and old == types.MethodType(type(owner).forward, owner)):
        setattr(owner, place, old)
    else:
        delattr(owner, place)


_AROUND = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper, torch.compile's, and those that spread it over devices.

    Raises:
        TypeError: no such model; the message says what was given.
    """
    inner = model
    while isinstance(inner, nn.Module) and RECORD not in vars(inner):
        if "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        elif type(inner).__name__ in _AROUND and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            break
    if not isinstance(inner, nn.Module):
        raise ArgumentTypeError(f"model: got {_described(model)}")
    return inner


def spread_by(model: nn.Module) -> str:
    """The name of the wrapper of torch's or DeepSpeed's that spreads a model over devices, or "" without one."""
    while "_orig_mod" in model._modules:
        model = model._orig_mod
    return type(model).__name__ if type(model).__name__ in _AROUND else ""


def _described(model: Any) -> str:
    """What was given in a model's place, and what is allowed."""
    if isinstance(model, type):
        return f"the class {model.__name__}, allowed a model, as {model.__name__}.from_pretrained makes one"
    if isinstance(model, str | os.PathLike):
        return (
            f"the name {shown(os.fspath(model))}, allowed a model: AutoModelForCausalLM.from_pretrained of it makes one"
        )
    held = getattr(model, "model", None)
    if isinstance(held, nn.Module):
        return f"a {type(model).__name__}, allowed the model in it: its .model, a {type(held).__name__}"
    return f"{'None' if model is None else 'a ' + type(model).__name__}, allowed a model of transformers"


def find_record(model: nn.Module) -> PatchRecord | None:
    record = vars(model).get(RECORD)
    if record is None and hasattr(model, "get_decoder"):
        record = vars(decoder_of(model)).get(RECORD)
    return record


def record_of(model: nn.Module) -> PatchRecord:
    record = find_record(model)
    if record is None:
        raise ArgumentError(f"model: this {type(model).__name__} is not patched; call patch_model first")
    return record


def decoder_of(model: nn.Module) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else getattr(model, "base_model", model)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids; for embeddings that accelerate offloads, where it moves them to."""
    embeddings = unwrap(model).get_input_embeddings()
    device = embeddings.weight.device
    target = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(target) if device.type == "meta" and target is not None else device


@contextlib.contextmanager
def memory_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is its frozen backbone, bit for bit; memories are neither read nor written.

    Holds for this context (thread or task) only; inside a torch.compile'd region, for the whole process.

    Raises:
        ValueError: the model is not patched.
    """
    record = record_of(unwrap(model))
    token = _disabled.set(_disabled.get() | {id(record)})
    record.disabled_depth += 1
    try:
        yield model
    finally:
        record.disabled_depth -= 1
        _disabled.reset(token)


def is_patched(model: nn.Module) -> bool:
    """Whether ``model`` has a memory; False for what is no model."""
    return isinstance(model, nn.Module) and find_record(unwrap(model)) is not None


def identity_of(model: nn.Module) -> Identity:
    """Identity of a patched model's memory. Raises ValueError if it has none."""
    return record_of(unwrap(model)).identity


def is_disabled(model: nn.Module) -> bool:
    """Whether the memory of a patched model is switched off in this context."""
    return record_disabled(record_of(unwrap(model)))


def record_disabled(record: PatchRecord) -> bool:
    # Context variables cannot be traced; inside a compiled region the depth, which is guarded, decides.
    if torch.compiler.is_compiling():
        return record.disabled_depth > 0
    return id(record) in _disabled.get()
