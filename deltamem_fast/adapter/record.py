"""What is known of a patched model: its memory's identity, and how to undo the patch."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..notices import logger
from .guard import UNGUARDED, Guarding
from .identity import Identity, new_token
from .layer import refuse_pickling
from .wrappers import RECORD, decoder_of, unwrap

_disabled: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("deltamem_disabled", default=frozenset())


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
    guarding: Guarding = UNGUARDED
    # Whether the table of embeddings had a row that is not finite when it was last looked at.
    broken_embeddings: bool = False
    disabled_depth: int = 0

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute and remember what was there."""
        present = name in vars(owner)
        self.replaced.append((owner, name, value, present, vars(owner).get(name)))
        setattr(owner, name, value)

    def extend(self, owner: Any, name: str, more: list[str]) -> None:
        """Put an instance's list, ``more`` behind what was in it, in the place of its list or its class's."""
        self.replace(owner, name, [*(getattr(owner, name, None) or []), *more])

    def override(self, owner: Any, name: str, function: Any, key: str = "") -> None:
        """Put ``function`` in a method's place; ``original`` knows that by ``key``, or else by its name."""
        self.originals[key or name] = vars(owner).get(name)
        self.replace(owner, name, types.MethodType(function, owner))

    def original(self, owner: Any, name: str, key: str = "") -> Any:
        """A method as it was before ``override``: the instance's, or the class's as it is now."""
        own = self.originals[key or name]
        return types.MethodType(getattr(type(owner), name), owner) if own is None else own

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
        vars(copied).update(copy.deepcopy(vars(self), memo))
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


def find_record(model: nn.Module) -> PatchRecord | None:
    record = vars(model).get(RECORD)
    if record is None and hasattr(model, "get_decoder"):
        record = vars(decoder_of(model)).get(RECORD)
    return record


def cache_argument(model: nn.Module) -> str:
    """What a patched model's forwards call their cache; of a bare one the name that all versions take."""
    record = find_record(model)
    return "past_key_values" if record is None else record.cache_name


def record_of(model: nn.Module) -> PatchRecord:
    record = find_record(model)
    if record is None:
        raise ArgumentError(f"model: this {type(model).__name__} is not patched; call patch_model first")
    return record


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
