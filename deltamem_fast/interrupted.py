"""Forwards that fail after their layers have begun: what they may have left half-written is marked."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .advance import MemoryCall
    from .record import PatchRecord
    from .state import MemoryState

# The model that is being called in this context, and what its decoder's forwards have written so far.
_running: contextvars.ContextVar[tuple[PatchRecord, list[tuple[MemoryCall, MemoryState]]] | None] = (
    contextvars.ContextVar("deltamem_running", default=None)
)


def marking(record: PatchRecord, run: Callable, *args, **kwargs) -> Any:
    """``run(*args, **kwargs)``; whatever it raises, memories and caches that forwards in it have written are marked.

    So that an error that comes after the last layer, of a hook on the model or of accelerate's, is seen as well:
    nobody got to know what the forward said. Inside another call of the same model that one marks. Compiled forwards
    are not watched: what they run is one piece, with no place for a mark.
    """
    if torch.compiler.is_compiling():
        return run(*args, **kwargs)
    running = _running.get()
    if running is not None and running[0] is record:
        return run(*args, **kwargs)
    calls: list[tuple[MemoryCall, MemoryState]] = []
    token = _running.set((record, calls))
    try:
        return run(*args, **kwargs)
    except BaseException as error:
        for call, state in calls:
            call.cut_short(error, state)
        raise
    finally:
        _running.reset(token)


def begun(call: MemoryCall) -> None:
    """Have ``marking`` know of a decoder's forward that is about to run its layers."""
    if torch.compiler.is_compiling():
        return
    running = _running.get()
    if running is not None:
        running[1].append((call, call.state))
