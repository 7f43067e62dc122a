"""What is installed here and would run, and what a memory is on one model: the facts behind ``deltamem info``."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
from typing import Any

import torch
from torch import nn

from deltamem_kernels.dispatch import installed, interpreting, resolve_backend

from ..adapter.record import identity_of
from ..display import columns, counted
from ..version import __version__

PACKAGES = ("torch", "transformers", "triton", "numba", "safetensors", "huggingface_hub", "flash-attn")
KERNELS = ("scan", "step", "read", "steer", "steer_heads_", "decode_")


def environment() -> dict[str, Any]:
    """Versions, devices and kernels, as one JSON object."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "devices": devices(),
        "kernels": kernels(),
    }


def versions() -> dict[str, str]:
    """Version of this package, of Python, and of each package that it uses; ``not installed`` where one is missing."""
    found = {"deltamem-fast": __version__, "python": platform.python_version()}
    return found | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    # The module decides, not the metadata: that is what the backends look at.
    if not installed(package.replace("-", "_")):
        return "not installed"
    if package == "torch":
        return torch.__version__  # with its build, such as +cpu
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"  # on the path without having been installed, or under another distribution's name


def devices() -> list[dict[str, Any]]:
    """Each device: ``device``, ``name``, ``capability`` (None for the CPU), and the ``backend`` that auto takes."""
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            found.append(_device(f"cuda:{index}", torch.cuda.get_device_name(index), f"{major}.{minor}"))
    found.append(_device("cpu", f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}", None))
    return found


def _device(device: str, name: str, capability: str | None) -> dict[str, Any]:
    backend = resolve_backend("auto", torch.device(device).type)
    return {"device": device, "name": name, "capability": capability, "backend": backend}


def kernels() -> dict[str, Any]:
    """``available``: names of the Triton kernels; ``note``: why there are none, or where they would run, or None."""
    if not installed("triton"):
        return {"available": [], "note": "triton is not installed"}
    try:
        from deltamem_kernels.triton import ops
    except Exception as error:  # a Triton that is installed can fail in any way when it is imported
        return {"available": [], "note": f"they cannot be imported: {type(error).__name__}: {error}"}
    available = [name for name in KERNELS if callable(getattr(ops, name, None))]
    note = None
    if interpreting():
        note = "run in Triton's interpreter (TRITON_INTERPRET)"
    elif not torch.cuda.is_available():
        note = "no GPU here to run them on"
    return {"available": available, "note": note}


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What the memory is on one patched model, as one JSON object.

    Returns:
        ``model``, ``adapter`` (their names), ``dtype``, ``device``, ``backend``, ``adapter_parameters``,
        ``memory_bytes`` (of one conversation), ``layers``: a list of ``layer``, ``path`` and ``reason``.
    """
    from ..model.patch import layer_paths  # transformers takes a while, and is not needed for what is installed

    identity = identity_of(model)
    names = identity.fingerprints()
    memories = identity.memories
    first = next(iter(memories.values()))
    weight = first.memory_q_proj
    return {
        "model": names["backbone_name"],
        "adapter": names["adapter_name"],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "backend": resolve_backend(first.backend, weight.device.type),
        "adapter_parameters": sum(p.numel() for m in memories.values() for p in m.parameters() if p.requires_grad),
        "memory_bytes": sum(4 * m.rule.heads * m.rule.rank**2 for m in memories.values()),
        "layers": [{"layer": i, "path": p.path, "reason": p.reason} for i, p in layer_paths(model).items()],
    }


def format_facts(facts: dict[str, Any]) -> str:
    """``model_facts`` as text; layers that run alike are one line."""
    rows = [(name, str(facts[name])) for name in ("model", "adapter", "dtype", "device", "backend")]
    rows.append(("parameters", f"{facts['adapter_parameters']:,} in the adapter"))
    rows.append(("memory", f"{facts['memory_bytes']:,} bytes a conversation"))
    for key, group in itertools.groupby(facts["layers"], key=lambda layer: (layer["path"], layer["reason"])):
        indices = [layer["layer"] for layer in group]
        span = f"layer {indices[0]}" if len(indices) == 1 else f"layers {indices[0]}-{indices[-1]}"
        rows.append((span, key[0] + (f": {key[1]}" if key[1] else "")))
    return "\n".join(columns(rows, (0, 1)))
