"""What the files of ``written_before/memories_v1`` hold, and their model; no random numbers: the same everywhere."""

import torch
from support import tiny_model

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model

IDS = ["ada", "ben", "Zoë/2"]


def model():
    """Three layers, the memory in two of them with two heads; every weight of the adapter is a multiple of 1/16."""
    patched = patch_model(tiny_model(), DeltaMemConfig.msw(heads=2, target_layers=(0, 2)))
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            if ".delta_memory." in name:
                numbers = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
                parameter.copy_((numbers % 13 - 6) / 16)
    return patched


def memory(patched, rows: int = len(IDS)):
    """Every state of every row is another; counters too."""
    made = MemoryState.zeros(patched, rows)
    for place, state in made.items():
        numbers = torch.arange(state.numel(), dtype=torch.float32).reshape(state.shape)
        state.copy_((numbers % 509 - 254) / 8 + place)
        made._skipped[place].copy_(torch.arange(rows, dtype=torch.int32) * 100 + place)
    return made
