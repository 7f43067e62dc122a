"""Others' implementations, where they can be imported: the released package as ``deltamem``, ``fla``.

Nothing of them is in this repository. ``DELTAMEM_RELEASED`` may name the folder that holds ``deltamem``; else it is
looked for on PYTHONPATH. The released package reads which tokens are real off the attention's mask, and under SDPA
misreads it where several tokens come on a filled cache; that does not change how long it takes.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable

import torch
from torch import nn

from deltamem_kernels.rule import DeltaRule

MISSING = {
    "released": "the released package is not importable (deltamem on PYTHONPATH, or its folder in DELTAMEM_RELEASED)",
    "fla": "flash-linear-attention is not importable",
}
FLA_DIM = 16  # the smallest head dimension that its kernels take


def _import(name: str):
    """A module, or None if it is not there or cannot run with what is installed."""
    try:
        return importlib.import_module(name)
    except Exception:  # a peer made for other versions fails in its own way; it is absent then
        return None


def released():
    """The released package's module with its patch, or None."""
    folder = os.environ.get("DELTAMEM_RELEASED")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    return _import("deltamem.core.delta")


def released_model(backbone: nn.Module, patched: nn.Module) -> nn.Module | None:
    """A copy of ``backbone`` with the released package's memory and the adapter of ``patched``, or None without it.

    Raises:
        ValueError: a parameter of theirs has no counterpart of its shape in ours.
    """
    package = released()
    if package is None:
        return None
    ours = next(module.delta_memory.config for module in patched.modules() if hasattr(module, "delta_memory"))
    names = ("rank", "alpha", "delta_heads", "num_state_heads", "state_update_mode", "rankwise_gates", "couple_lambda")
    config = package.HFDeltaMemConfig(**{name: getattr(ours, name) for name in names})
    model = copy.deepcopy(backbone)
    package.attach_delta_mem(model, config)
    sources = {name.replace(".delta_memory.", "."): value for name, value in patched.named_parameters()}
    with torch.no_grad():
        for name, parameter in _adapter_of(model):
            source = sources.get(name)
            if source is None or source.shape != parameter.shape:
                raise ValueError(f"the released package has {name} {list(parameter.shape)}, this one does not")
            parameter.copy_(source)
    return model.eval()


def _adapter_of(model: nn.Module):
    """(name, parameter) of the released memory's own parameters."""
    for module_name, module in released().iter_delta_mem_modules(model):
        for name, parameter in module.named_parameters():
            if not name.startswith("base."):
                yield f"{module_name}.{name}", parameter


def forget(model: nn.Module) -> None:
    """Start a conversation anew: the released package keeps its states in the model."""
    package = sys.modules.get("deltamem.core.delta")
    if package is not None:
        package.reset_delta_mem_states(model)


def released_inputs(projections: torch.Tensor, bias: torch.Tensor, rule: DeltaRule) -> tuple[torch.Tensor, ...]:
    """What the released scan takes, [B, T, r] each: q, k (unit vectors), v, keep, erase, write. H = 1, coupled."""
    r, wide = rule.rank, projections.float()
    q, k = (torch.nn.functional.normalize(torch.tanh(wide[..., i * r : (i + 1) * r]), dim=-1, eps=1e-6) for i in (0, 1))
    beta = torch.sigmoid(wide[..., 3 * r : 4 * r] + bias.float())
    made = (q, k, wide[..., 2 * r : 3 * r], 1 - beta, beta, beta)
    return tuple(tensor.to(projections.dtype).contiguous() for tensor in made)


def released_scan(device: str) -> Callable | None:
    """scan(state [B, r, r], q, k, v, keep, erase, write) → (state, reads): their kernel, on a CPU their loop; or None.

    Projections, tanh, norms and gates are not in it, as they are in ours: a comparison in their favour.
    """
    package = released()
    if package is None:
        return None
    if device == "cuda":
        return getattr(_import("deltamem.kernels.affine_scan"), "triton_affine_scan", None)
    # a loop that uses nothing of the module that it is a method of
    loop = package.DeltaMemAttention._memory_affine_scan_torch
    return lambda *tensors: loop(None, *tensors)


def fla_scan(device: str) -> Callable | None:
    """scan(q, k, v [B, T, 1, 16], beta, g [B, T, 1]): fla's chunked gated delta rule, or None.

    Another function: one gate a token where δ-mem has one a row. For scale only.
    """
    module = _import("fla.ops.gated_delta_rule") if device == "cuda" else None
    rule = getattr(module, "chunk_gated_delta_rule", None)
    return None if rule is None else lambda q, k, v, beta, g: rule(q, k, v, g=g, beta=beta, output_final_state=True)
