"""Which implementation runs: Triton on a GPU, numba on a CPU if installed, else the reference."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch

from .errors import ArgumentError

BACKENDS = ("auto", "triton", "numba", "reference")
logger = logging.getLogger("deltamem_fast")
_loaded: dict[tuple[str, str], ModuleType] = {}
_loaded_heads: dict[tuple[str, str], ModuleType] = {}
_said: set[str] = set()


@functools.cache
def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def interpreting() -> bool:
    """Whether Triton runs its kernels on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def resolve_backend(backend: str, device_type: str) -> str:
    """The backend that ``backend`` means for tensors on ``device_type``; ``auto`` says once which.

    Raises:
        ValueError: an unknown backend, or one that cannot run there; never a silent fallback.
    """
    if backend not in BACKENDS:
        raise ArgumentError(f"backend: got {backend!r}, allowed {', '.join(BACKENDS)}")
    gpu = device_type in ("cuda", "xpu")
    if backend == "auto":
        if gpu and installed("triton"):
            chosen = "triton"
        elif device_type == "cpu" and installed("numba"):
            chosen = "numba"
        else:
            chosen = "reference"
        if device_type not in _said:
            _said.add(device_type)
            logger.info("backend=auto: %s for tensors on %s", chosen, device_type)
        return chosen
    if backend == "triton":
        if not installed("triton"):
            raise ArgumentError("backend: got 'triton', but the package triton is not installed")
        if not gpu and not interpreting():
            raise ArgumentError(
                f"backend: got 'triton' for tensors on {device_type}, allowed on a GPU "
                "(on a CPU only with TRITON_INTERPRET=1 set before Python starts)"
            )
    if backend == "numba":
        if not installed("numba"):
            raise ArgumentError("backend: got 'numba', but the package numba is not installed (extra: cpu)")
        if device_type != "cpu":
            raise ArgumentError(f"backend: got 'numba' for tensors on {device_type}, allowed on cpu")
    return backend


def _load(name: str) -> ModuleType:
    if name == "triton":
        from deltamem_kernels import ops
    elif name == "numba":
        from . import numba_backend as ops
    else:
        from . import reference as ops
    return ops


def head_operations(backend: str, device: torch.device) -> ModuleType:
    """The module whose ``steer_heads_`` and ``decode_`` run for ``backend`` on ``device``."""
    module = _loaded_heads.get((backend, device.type))
    if module is None:
        name = resolve_backend(backend, device.type)
        module = _loaded_heads[backend, device.type] = _load_heads(name)
    return module


def _load_heads(name: str) -> ModuleType:
    if name == "triton":
        from deltamem_kernels import ops
    elif name == "numba":
        from . import numba_heads as ops
    else:
        from . import reference_heads as ops
    return ops


def operations(backend: str, device: torch.device) -> ModuleType:
    """The module whose ``scan``, ``step``, ``read`` and ``steer`` run for ``backend`` on ``device``."""
    # A plain dict: the compiler traces the lookup, where it would warn of a cached function.
    module = _loaded.get((backend, device.type))
    if module is None:
        module = _loaded[backend, device.type] = _load(resolve_backend(backend, device.type))
    return module
