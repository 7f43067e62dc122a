"""A memory file without the model that it was made with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..adapter.fingerprints import public_label
from .file import read_memory
from .state import MemoryState

NAMES = ("adapter_name", "adapter_fingerprint", "backbone_name", "backbone_fingerprint")


@dataclass(frozen=True)
class MemoryFile:
    """What a file that ``MemoryState.save`` wrote holds.

    Attributes:
        path: of the file.
        memory: on the CPU; it belongs to no model, so it can be looked at, but no model takes it as its own.
        adapter_name, adapter_fingerprint, backbone_name, backbone_fingerprint: of what it was made with, "" where the
            file does not say.
        fingerprints: as the file has them.
    """

    path: Path
    memory: MemoryState
    adapter_name: str
    adapter_fingerprint: str
    backbone_name: str
    backbone_fingerprint: str
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def made_with(self) -> str:
        """Adapter and backbone in words, with the beginning of their fingerprints."""
        adapter = f"adapter {self.adapter_name} ({self.adapter_fingerprint[:12]})"
        return f"{adapter} on {self.backbone_name} ({self.backbone_fingerprint[:12]})"


def read_memory_file(path: str | os.PathLike, name: str = "path") -> MemoryFile:
    """Read a memory file; no model is needed, and no fingerprint compared.

    Args:
        path: a file that ``MemoryState.save`` wrote.
        name: the argument that an error names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no memory file, a newer format, or damaged: its tensors are not what its metadata says.
    """
    content = read_memory(path, name)
    path = Path(path)
    memory = MemoryState(content.layers, frozen=content.frozen, skipped=content.skipped)
    said = {key: content.fingerprints.get(key, "") for key in NAMES}
    # Versions before wrote paths.
    said |= {key: public_label(value) for key, value in said.items() if key.endswith("_name")}
    return MemoryFile(path, memory, **said, fingerprints=content.fingerprints)
