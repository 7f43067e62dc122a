"""δ-mem, the 8×8 online memory for frozen LLMs, with fused kernels.

model = patch_model(model, "path/or/hub-id")
memory = MemoryState.zeros(model, batch_size=1)
model.generate(**inputs, memory=memory)
"""

from .adapter import export_adapter, load_adapter, save_adapter
from .cache import memory_state
from .config import DeltaMemConfig
from .gates import record_gates
from .patch import layer_paths, patch_model, unpatch_model
from .record import is_patched, memory_disabled
from .state import MemoryState
from .version import __version__

__all__ = [
    "DeltaMemConfig",
    "MemoryState",
    "__version__",
    "export_adapter",
    "is_patched",
    "layer_paths",
    "load_adapter",
    "memory_disabled",
    "memory_state",
    "patch_model",
    "record_gates",
    "save_adapter",
    "segment_ids_from_messages",
    "unpatch_model",
]


def __getattr__(name: str):
    if name == "segment_ids_from_messages":
        from .segments import segment_ids_from_messages

        return segment_ids_from_messages
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
