"""Calls of several launches, replayed.

What a call allocates and launches follows from its settings and from the shapes, strides, dtypes and alignments of its
tensors. It is noted the first time and done again for other tensors, without asking anew: most of a call's time on the
host goes into asking. The layers of a model differ in nothing but their tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import launch as _launch
from .launch import Launched, compiler_sees, interpreted, launch_again, notes

Tensors = tuple[torch.Tensor | None, ...]
PLANS = 512  # distinct calls that are kept


class Allocation(NamedTuple):
    """A tensor that a call allocates."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool


class Again(NamedTuple):
    """A launch of a call.

    Attributes:
        values: the kernel's arguments, None where a tensor or a tuple with tensors goes.
        tensors: (argument, place of its tensor).
        tuples: (argument, places of the tensors that it begins with, what follows them).
    """

    launched: Launched
    programs: int
    values: list
    tensors: list[tuple[int, int]]
    tuples: list[tuple[int, list[int], tuple]]


class Plan(NamedTuple):
    """A call: its steps in order, and the places of its results. Places count the inputs, then what is allocated."""

    steps: list[Allocation | Again]
    results: list[int]


_plans: dict[tuple, Plan] = {}


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zeros: bool = False) -> torch.Tensor:
    """An empty tensor, or zeros, of which a replayed call gets one like it."""
    tensor = (torch.zeros if zeros else _launch.empty)(shape, dtype=dtype, device=device)
    if notes.steps is not None:
        notes.steps.append((tensor, Allocation(tuple(shape), dtype, zeros)))
    return tensor


def replayed(body: Callable[..., Tensors], inputs: Tensors, *settings) -> Tensors:
    """``body(*inputs, *settings)``, by its plan if there is one. Not differentiable.

    Args:
        body: allocates with ``allocate`` alone, launches with ``launch``, and returns what it allocated, or None. It
            hands to launches its inputs and these, no views of them.
        inputs: the first is a tensor on the device of all.
        settings: hashable; with what ``inputs`` look like, all that ``body`` goes by.
    """
    if _launch.recorded is not None or interpreted():
        return body(*inputs, *settings)
    seen = [None if t is None else (t.dtype, t.shape, t.stride()) for t in inputs]
    key = body, settings, inputs[0].device, compiler_sees(inputs), *seen
    plan = _plans.get(key)
    if plan is not None:
        return _run(plan, inputs)
    # One tensor in two places is two in the plan: the next call may have two.
    inputs = tuple([None if t is None else t.detach() for t in inputs])
    steps, notes.steps = notes.steps, []
    try:
        results = body(*inputs, *settings)
        plan = _plan(inputs, notes.steps, results)
    finally:
        notes.steps = steps
    if len(_plans) >= PLANS:
        _plans.pop(next(iter(_plans)), None)
    _plans[key] = plan
    return results


def _plan(inputs: Tensors, noted: list[tuple], results: Tensors) -> Plan:
    """What was noted, with places where it had tensors. The last place is None's."""
    places = {id(tensor): place for place, tensor in enumerate(inputs)}
    steps: list[Allocation | Again] = []
    for step in noted:
        if isinstance(step[1], Allocation):
            places[id(step[0])] = len(inputs) + sum(isinstance(s, Allocation) for s in steps)
            steps.append(step[1])
        else:
            steps.append(step)
    places[id(None)] = -1

    def again(launched: Launched, programs: int, values: list) -> Again:
        kept, tensors, tuples = list(values), [], []
        for argument, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                kept[argument] = None
                tensors.append((argument, places[id(value)]))
            elif isinstance(value, tuple):
                first = sum(field.endswith("_ptr") for field in value._fields)
                kept[argument] = None
                tuples.append((argument, [places[id(part)] for part in value[:first]], tuple(value[first:])))
        return Again(launched, programs, kept, tensors, tuples)

    steps = [step if isinstance(step, Allocation) else again(*step) for step in steps]
    return Plan(steps, [places[id(result)] for result in results])


def _run(plan: Plan, inputs: Tensors) -> Tensors:
    """Allocate and launch as the plan says."""
    found, device = [*inputs, None], inputs[0].device  # None stays last
    for step in plan.steps:
        if isinstance(step, Allocation):
            make = torch.zeros if step.zeros else _launch.empty
            found.insert(-1, make(step.shape, dtype=step.dtype, device=device))
            continue
        values = step.values.copy()
        for argument, place in step.tensors:
            values[argument] = found[place]
        for argument, heads, rest in step.tuples:
            values[argument] = (*[found[place] for place in heads], *rest)
        launch_again(step.launched, step.programs, inputs[0], values)
    return tuple([found[place] for place in plan.results])
