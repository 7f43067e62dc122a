"""The forwards that patch_model puts on a model: they make a memory call and hand it down to the attention layers."""

from __future__ import annotations

import contextvars
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..adapter.record import PatchRecord, record_disabled
from ..errors import ArgumentTypeError, StateError
from ..memory.state import MemoryState
from ..memory.watch import current_capture, current_record
from .begin import CallersMemory, begin, check_unused, composite_mask
from .cache import mark_missed
from .call import MemoryCall
from .checkpointing import enter, leave
from .finite import contain, give_back
from .signatures import given_cache

MEMORY_ARGUMENTS = ("memory", "segment_ids", "token_mask", "trust")


def with_signature(module: nn.Module, function):
    """A copy of ``function`` whose signature is the module's own and the memory's arguments (generate reads it)."""
    copied = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__doc__ = type(module).forward.__doc__
    found = dict(inspect.signature(module.forward).parameters)
    for name in MEMORY_ARGUMENTS:
        found.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    copied.__signature__ = inspect.Signature([own, *sorted(found.values(), key=lambda parameter: parameter.kind)])
    return copied


def patched_call(self, *args, **kwargs):
    """What ``model(...)`` runs, forward and hooks."""
    record = self._delta_memory_patch
    outermost = self is not record.decoder or "outer" not in record.originals
    return _marking(record, type(self)._call_impl, (self, *args), kwargs, anew=outermost)


def outer_forward(self, *args, memory=None, segment_ids=None, token_mask=None, trust=None, **kwargs):
    record = self._delta_memory_patch
    if memory is not None:
        # Hooks that move arguments between devices would copy it, and the copy would be written.
        kwargs["memory"] = CallersMemory(memory)
    if segment_ids is not None:
        kwargs["segment_ids"] = segment_ids
    if trust is not None:
        kwargs["trust"] = trust
    named = dict(zip(_positional_of(record, self), args)) | kwargs if args else kwargs
    if token_mask is None and record.composite and not record_disabled(record):
        token_mask = composite_mask(named)
    if token_mask is not None:
        kwargs["token_mask"] = token_mask
    own = record.originals["outer"]
    if own is None:
        return _marking(record, type(self).forward, (self, *args), kwargs)
    return _marking(record, own, args, kwargs)


def decoder_forward(self, *args, memory=None, segment_ids=None, token_mask=None, trust=None, **kwargs):
    record = self._delta_memory_patch
    own = record.originals["decoder"]
    if isinstance(memory, CallersMemory):
        memory = memory.state
    if args:
        kwargs.update(_by_name(record, self, args, kwargs))
    name = record.cache_name
    if record_disabled(record):
        check_unused(record.identity, kwargs, memory, segment_ids, token_mask, trust)
        mark_missed(given_cache(kwargs))
        return type(self).forward(self, **kwargs) if own is None else own(**kwargs)
    if name not in kwargs and "past_key_values" in kwargs:
        name = "past_key_values"  # newer versions take this one too, and warn of it themselves
    call = begin(self, record.identity, kwargs, memory, segment_ids, token_mask, trust, name, record.guarding)
    running = None if torch.compiler.is_compiling() else _running.get()
    if running is not None and running.calls is not None:
        running.calls.append((call, call.state))
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
    now = positional_names(type(module).forward)
    return names if now is None else now


def positional_names(forward) -> tuple[str, ...] | None:
    """The arguments of a function that may be given by position, without self; None: any."""
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None
    return tuple(p.name for p in parameters if p.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD)[1:]


# --- forwards that fail after their layers have begun: what they may have left half-written is marked


class _Running:
    """A call of a patched model.

    Attributes:
        record: the model's.
        calls: what its decoder's forwards have written so far; None: the call is over, and a copy of its context is
            all that is left of it.
    """

    def __init__(self, record: PatchRecord):
        self.record = record
        self.calls: list[tuple[MemoryCall, MemoryState]] | None = []


_running: contextvars.ContextVar[_Running | None] = contextvars.ContextVar("deltamem_running", default=None)


def _marking(record: PatchRecord, run: Callable, args: tuple, kwargs: dict[str, Any], *, anew: bool = False) -> Any:
    """``run(*args, **kwargs)``; whatever it raises, memories and caches that forwards in it have written are marked.

    So that an error that comes after the last layer, of a hook on the model or of accelerate's, is seen as well:
    nobody got to know what the forward said. Inside another call of the same model that one marks, unless ``anew``.

    Two things cannot be seen here: an interrupt between the end of this function and the caller's hold of what it
    returns, and an error inside compiled forwards, which are one piece without a place for a mark.
    """
    if torch.compiler.is_compiling():
        return run(*args, **kwargs)
    around = _running.get()
    if not anew and around is not None and around.calls is not None and around.record is record:
        return run(*args, **kwargs)
    running = _Running(record)
    try:
        _running.set(running)
        return run(*args, **kwargs)
    except BaseException as error:
        for call, state in running.calls:
            call.cut_short(error, state)
        raise
    finally:
        running.calls = None
        _running.set(around)  # not by a token: an interrupt may come before there is one
