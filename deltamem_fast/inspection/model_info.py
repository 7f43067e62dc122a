"""What a memory is on one model: the facts behind ``deltamem info MODEL``."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from deltamem_kernels.dispatch import resolve_backend

from ..adapter.record import identity_of
from ..display import columns
from ..model.patch import layer_paths


def model_facts(model: nn.Module) -> dict[str, Any]:
    """A patched model's memory as one JSON object.

    Returns:
        ``model``, ``adapter`` (their names), ``dtype``, ``device``, ``backend``, ``adapter_parameters``,
        ``memory_bytes`` (of one conversation), ``layers``: a list of ``layer``, ``path`` and ``reason``.
    """
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
