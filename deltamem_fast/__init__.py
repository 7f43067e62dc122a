"""δ-mem, the 8×8 online memory for frozen LLMs, with fused kernels.

model = patch_model(model, "path/or/hub-id")
memory = MemoryState.zeros(model, batch_size=1)
model.generate(**inputs, memory=memory)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:  # each under its own name: to a type checker it is public then
    from .adapter.files import export_adapter as export_adapter
    from .adapter.files import load_adapter as load_adapter
    from .adapter.files import save_adapter as save_adapter
    from .adapter.guard import Guard as Guard
    from .adapter.hub import push_to_hub as push_to_hub
    from .adapter.record import is_patched as is_patched
    from .adapter.record import memory_disabled as memory_disabled
    from .config import DeltaMemConfig as DeltaMemConfig
    from .errors import DeltaMemError as DeltaMemError
    from .memory.bank import BankConflict as BankConflict
    from .memory.bank import MemoryBank as MemoryBank
    from .memory.operators import WriteResult as WriteResult
    from .memory.operators import forget as forget
    from .memory.operators import ingest as ingest
    from .memory.operators import retrieve as retrieve
    from .memory.operators import revise as revise
    from .memory.state import MemoryState as MemoryState
    from .memory.watch import record_gates as record_gates
    from .model.cache import memory_state as memory_state
    from .model.patch import layer_paths as layer_paths
    from .model.patch import patch_model as patch_model
    from .model.patch import unpatch_model as unpatch_model
    from .session import MemorySession as MemorySession
    from .text.segments import segment_ids_from_messages as segment_ids_from_messages

# Module → the public names that it holds. Imported when first asked for: a process that only stores memories
# (deltamem_fast.storage), or prints a version, needs neither torch nor transformers.
_HOMES = {
    "adapter.files": ("export_adapter", "load_adapter", "save_adapter"),
    "adapter.guard": ("Guard",),
    "adapter.hub": ("push_to_hub",),
    "adapter.record": ("is_patched", "memory_disabled"),
    "config": ("DeltaMemConfig",),
    "errors": ("DeltaMemError",),
    "memory.bank": ("BankConflict", "MemoryBank"),
    "memory.operators": ("WriteResult", "forget", "ingest", "retrieve", "revise"),
    "memory.state": ("MemoryState",),
    "memory.watch": ("record_gates",),
    "model.cache": ("memory_state",),
    "model.patch": ("layer_paths", "patch_model", "unpatch_model"),
    "session": ("MemorySession",),
    "text.segments": ("segment_ids_from_messages",),
}

__all__ = ["__version__", *(name for names in _HOMES.values() for name in names)]


def __getattr__(name: str):
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
