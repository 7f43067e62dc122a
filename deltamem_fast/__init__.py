"""δ-mem, the 8×8 online memory for frozen LLMs, with fused kernels.

model = patch_model(model, "path/or/hub-id")
memory = MemoryState.zeros(model, batch_size=1)
model.generate(**inputs, memory=memory)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .adapter import export_adapter, load_adapter, save_adapter
    from .bank import BankConflict, MemoryBank
    from .cache import memory_state
    from .config import DeltaMemConfig
    from .errors import DeltaMemError
    from .gates import record_gates
    from .hub import push_to_hub
    from .operators import WriteResult, forget, ingest, retrieve, revise
    from .patch import layer_paths, patch_model, unpatch_model
    from .record import is_patched, memory_disabled
    from .segments import segment_ids_from_messages
    from .session import MemorySession
    from .state import MemoryState

# Public name → the module that holds it. Imported when first asked for: a process that only stores memories
# (deltamem_fast.storage), or prints a version, needs neither torch nor transformers.
_HOMES = {
    "BankConflict": "bank",
    "DeltaMemConfig": "config",
    "DeltaMemError": "errors",
    "MemoryBank": "bank",
    "MemorySession": "session",
    "MemoryState": "state",
    "WriteResult": "operators",
    "export_adapter": "adapter",
    "forget": "operators",
    "ingest": "operators",
    "is_patched": "record",
    "layer_paths": "patch",
    "load_adapter": "adapter",
    "memory_disabled": "record",
    "memory_state": "cache",
    "patch_model": "patch",
    "push_to_hub": "hub",
    "record_gates": "gates",
    "retrieve": "operators",
    "revise": "operators",
    "save_adapter": "adapter",
    "segment_ids_from_messages": "segments",
    "unpatch_model": "patch",
}

__all__ = [
    "BankConflict",
    "DeltaMemConfig",
    "DeltaMemError",
    "MemoryBank",
    "MemorySession",
    "MemoryState",
    "WriteResult",
    "__version__",
    "export_adapter",
    "forget",
    "ingest",
    "is_patched",
    "layer_paths",
    "load_adapter",
    "memory_disabled",
    "memory_state",
    "patch_model",
    "push_to_hub",
    "record_gates",
    "retrieve",
    "revise",
    "save_adapter",
    "segment_ids_from_messages",
    "unpatch_model",
]


def __getattr__(name: str):
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
