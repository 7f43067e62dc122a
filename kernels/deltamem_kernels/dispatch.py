"""Which implementation runs: Triton on a GPU, numba on a CPU if installed, else the reference.

Each backend has a module ``ops`` with all ``Operators``; ``operations`` finds it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from .errors import ArgumentError, MissingPackageError
from .layout import HeadLayout, Steering
from .rule import DeltaRule, ScanOutput

BACKENDS = ("auto", "triton", "numba", "reference")
logger = logging.getLogger("deltamem_fast")
loaded: dict[tuple[str, str], ModuleType] = {}
_said: set[str] = set()


class Operators(Protocol):
    """What every backend's ``ops`` has; ``reference.recurrence`` and ``reference.heads`` say what each computes.

    A backend's own parameters beside these are keywords with a default.
    """

    def scan(
        projections: Tensor, gate_bias: Tensor, state: Tensor | None, rule: DeltaRule, *,
        mask: Tensor | None = None, cu_seqlens: Tensor | None = None, slots: Tensor | None = None,
        checkpoint_every: int = 0,
    ) -> ScanOutput: ...  # fmt: skip

    def step(
        projections: Tensor, gate_bias: Tensor, state: Tensor, rule: DeltaRule, *,
        mask: Tensor | None = None, slots: Tensor | None = None, skipped: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip

    def read(
        projections: Tensor, state: Tensor, rule: DeltaRule, *,
        mask: Tensor | None = None, slots: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip

    def steer(
        base: Tensor, reads: Tensor, weight: Tensor, scale: float, *,
        norm_weight: Tensor | None = None, eps: float = 1e-6,
    ) -> Tensor: ...  # fmt: skip

    def delta(
        reads: Tensor, weight: Tensor, scale: float, dtype: torch.dtype, *,
        norm_weight: Tensor | None = None, eps: float = 1e-6,
    ) -> Tensor: ...  # fmt: skip

    def steer_heads_(
        packed: Tensor, reads: Tensor, layout: HeadLayout, steering: Steering,
        cos: Tensor | None = None, sin: Tensor | None = None, *, check: bool = True,
    ) -> None: ...  # fmt: skip

    def decode_(
        packed: Tensor, gate_bias: Tensor, state: Tensor, rule: DeltaRule, layout: HeadLayout, steering: Steering,
        cos: Tensor | None = None, sin: Tensor | None = None, *,
        mask: Tensor | None = None, slots: Tensor | None = None, skipped: Tensor | None = None,
        frozen: bool = False, check: bool = True, workspace: object = None,
    ) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip

    def workspace(kept: dict, counter: Tensor | None) -> object: ...


@functools.cache
def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def why_unusable(backend: str) -> str:
    """Why the package behind ``triton`` or ``numba`` cannot be used here, or ""; imports it, once.

    A package that is installed may refuse to be imported (another NumPy, a broken llvmlite, a driver), and numba to
    compile where its cache on disk cannot be written.
    """
    if not installed(backend):
        return f"the package {backend} is not installed" + (" (extra: cpu)" if backend == "numba" else "")
    try:
        if backend == "numba":
            from numba import config

            if config.DISABLE_JIT:
                return "the package numba compiles nothing here (NUMBA_DISABLE_JIT)"
        _load(backend)
    except Exception as error:  # whatever it is, a model goes on without it
        reason = f"the package {backend} cannot be used here: {type(error).__name__}: {' '.join(str(error).split())}"
        if "no locator available" in str(error):
            reason += "; its cache needs a directory that can be written: set NUMBA_CACHE_DIR to one"
        return reason
    return ""


def interpreting() -> bool:
    """Whether Triton runs its kernels on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` is the name of one."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ArgumentError(f"backend: got {backend!r}, allowed {', '.join(BACKENDS)}")


def resolve_backend(backend: str, device_type: str) -> str:
    """The backend that ``backend`` means for tensors on ``device_type``; ``auto`` says once which.

    Raises:
        ValueError: an unknown backend, or one that does not run on that device; never a silent fallback.
        ImportError: the package of the backend is missing or cannot be used; the message says why. ``auto`` warns
            of one that cannot be used, and takes the reference.
    """
    check_backend(backend)
    gpu = device_type in ("cuda", "xpu")
    if backend == "auto":
        return _best(device_type, "triton" if gpu else "numba" if device_type == "cpu" else "reference")
    if backend == "triton" and not gpu and not interpreting():
        raise ArgumentError(
            f"backend: got 'triton' for tensors on {device_type}, allowed on a GPU "
            "(on a CPU only with TRITON_INTERPRET=1 set before Python starts)"
        )
    if backend == "numba" and device_type != "cpu":
        raise ArgumentError(f"backend: got 'numba' for tensors on {device_type}, allowed on cpu")
    if backend != "reference" and (reason := why_unusable(backend)):
        raise MissingPackageError(f"backend: got {backend!r}, but {reason}")
    return backend


def _best(device_type: str, wanted: str) -> str:
    """``wanted``, or the reference if it cannot be used."""
    reason = "" if wanted == "reference" else why_unusable(wanted)
    chosen = "reference" if reason else wanted
    if device_type not in _said:
        _said.add(device_type)
        logger.info("backend=auto: %s for tensors on %s", chosen, device_type)
        if reason and installed(wanted):
            logger.warning("backend=auto: %s; the reference runs instead, which is slower", reason)
    return chosen


def _load(name: str) -> ModuleType:
    if name == "triton":
        from .triton import ops
    elif name == "numba":
        from .numba import ops
    else:
        from .reference import ops
    return ops


def operations(backend: str, device: torch.device) -> Operators:
    """The module whose operators run for ``backend`` on ``device``; errors as in ``resolve_backend``."""
    # A plain dict: the compiler traces the lookup, where it would warn of a cached function.
    module = loaded.get((backend, device.type))
    if module is None:
        module = loaded[backend, device.type] = _load(resolve_backend(backend, device.type))
    return module
