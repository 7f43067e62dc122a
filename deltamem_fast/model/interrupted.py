"""Forwards that fail after their layers have begun: what they may have left half-written is marked."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch

from ..adapter.record import PatchRecord
from ..memory.state import MemoryState
from .call import MemoryCall


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


def marking(record: PatchRecord, run: Callable, args: tuple, kwargs: dict[str, Any], *, anew: bool = False) -> Any:
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


def begun(call: MemoryCall) -> None:
    """Have ``marking`` know of a decoder's forward that is about to run its layers."""
    if torch.compiler.is_compiling():
        return
    running = _running.get()
    if running is not None and running.calls is not None:
        running.calls.append((call, call.state))
