"""What a decoded token costs in tensor operations and kernel launches, counted without a GPU.

The rule: every operator that PyTorch's dispatcher sees counts, but for views and ``_unsafe_view``, which compute
nothing; so does every launch that goes past the dispatcher, Triton's through ``deltamem_kernels.triton.launch`` and a
call from Python into a function compiled by numba. By this rule one layer of an unpatched Qwen3 (bfloat16, SDPA) costs
56 and one with the released δ-mem 107.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deltamem_kernels.dispatch import installed

LAYERS = (4, 8)
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


@dataclass
class Count:
    """What ran inside ``counting()``.

    Attributes:
        operations: operators that the dispatcher saw, by name, views left out.
        launches: kernels that went past it, by name.
    """

    operations: Counter = field(default_factory=Counter)
    launches: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Operations and launches together."""
        return self.operations.total() + self.launches.total()

    @property
    def allocations(self) -> int:
        """How many of the operations only allocate; they count too."""
        return sum(self.operations[name] for name in ALLOCATIONS)


class _Operations(TorchDispatchMode):
    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not (function.is_view or name == "aten::_unsafe_view"):
            self.counter[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def _triton_launches(counter: Counter) -> Iterator[None]:
    """Count the calls of ``deltamem_kernels.triton.launch.launch``, under whatever module's name it is called."""
    package = importlib.import_module("deltamem_kernels.triton")
    original = importlib.import_module("deltamem_kernels.triton.launch").launch
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")

    def counted(kernel, *args, **kwargs):
        counter[getattr(getattr(kernel, "fn", kernel), "__name__", str(kernel))] += 1
        return original(kernel, *args, **kwargs)

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("deltamem_kernels.")]
    holders = [m for m in modules if getattr(m, "launch", None) is original]
    with ExitStack() as stack:
        for module in holders:
            stack.enter_context(mock.patch.object(module, "launch", counted))
        yield


@contextmanager
def _numba_calls(counter: Counter) -> Iterator[None]:
    """Count the calls from Python into compiled functions; one compiled function calling another is one call."""
    from numba.core.dispatcher import Dispatcher

    original = Dispatcher.__call__  # C's, inherited: no call of a subclass goes past this class

    def counted(self, *args, **kwargs):
        counter[self.py_func.__name__] += 1
        return original(self, *args, **kwargs)

    with mock.patch.object(Dispatcher, "__call__", counted):
        yield


@contextmanager
def counting() -> Iterator[Count]:
    """Count tensor operations and launches of this thread; nests with nothing else that counts."""
    count = Count()
    with ExitStack() as stack:
        for package, counted in (("triton", _triton_launches), ("numba", _numba_calls)):
            if installed(package):
                stack.enter_context(counted(count.launches))
        stack.enter_context(_Operations(count.operations))
        yield count


@contextmanager
def triton_without_device() -> Iterator[None]:
    """Let ``backend="triton"`` take CPU tensors: launches are taken down, nothing runs, outputs hold anything.

    For counting alone. The model must be patched and run inside.
    """
    from deltamem_kernels import dispatch as backends
    from deltamem_kernels.triton import launch

    pretended = {"interpreting": lambda: True, "loaded": {}}  # what is chosen inside is forgotten after it
    with mock.patch.object(launch, "recorded", []), mock.patch.multiple(backends, **pretended):
        yield


@torch.no_grad()
def decoded_token(model: nn.Module, batch: int = 1) -> Count:
    """Count one forward of one token per row, on a DynamicCache that a prompt of 8 and two tokens are in."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.randint(model.config.vocab_size, (batch, 11))
    for part in (ids[:, :8], ids[:, 8:9], ids[:, 9:10]):  # what is made once is made now
        model(part, past_key_values=cache, logits_to_keep=1)
    with counting() as count:
        model(ids[:, 10:], past_key_values=cache, logits_to_keep=1)
    return count


def per_layer(build: Callable[[int], nn.Module], batch: int = 1) -> Count:
    """What one layer of a decoder costs for a decoded token, by name: the difference of two depths.

    Args:
        build: gives the model with that many layers.
        batch: rows.

    Raises:
        ValueError: the layers do not cost the same, so there is no number for one.
    """
    few, many = (decoded_token(build(layers), batch) for layers in LAYERS)
    difference = LAYERS[1] - LAYERS[0]
    result = Count()
    for kind in ("operations", "launches"):
        for name, number in getattr(many, kind).items():
            more = number - getattr(few, kind)[name]
            if more % difference:
                raise ValueError(f"{name}: {more} more in {difference} more layers, so layers differ")
            getattr(result, kind)[name] = more // difference
    return result
