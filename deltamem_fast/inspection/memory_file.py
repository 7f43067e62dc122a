"""A memory file without the model that it was made with."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import FileFormatError, FileMissingError
from ..files import read_tensors
from ..state import FORMAT, FORMAT_VERSION, MemoryState

NAMES = ("adapter_name", "adapter_fingerprint", "backbone_name", "backbone_fingerprint")


@dataclass(frozen=True)
class MemoryFile:
    """What a file that ``MemoryState.save`` wrote holds.

    Attributes:
        path: of the file.
        memory: on the CPU; it belongs to no model, so it can be looked at, but no model takes it as its own.
        adapter_name, adapter_fingerprint, backbone_name, backbone_fingerprint: of what it was made with, "" where the
            file does not say.
    """

    path: Path
    memory: MemoryState
    adapter_name: str
    adapter_fingerprint: str
    backbone_name: str
    backbone_fingerprint: str

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
        ValueError: no memory file, a newer format, or its tensors are not what its metadata says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileMissingError(f"{name}: {path}: no such file")
    metadata, tensors = read_tensors(path, name)
    if metadata.get("format") != FORMAT:
        raise FileFormatError(
            f"{name}: {path}: not a memory file (format {metadata.get('format')!r}, allowed {FORMAT!r})"
        )
    version = metadata.get("format_version", "")
    if not version.isdigit() or not 1 <= int(version) <= FORMAT_VERSION:
        raise FileFormatError(f"{name}: {path}: format version {version!r}, this version reads 1 to {FORMAT_VERSION}")
    try:
        shapes = {int(i): tuple(shape) for i, shape in json.loads(metadata["layers"]).items()}
        frozen = bool(json.loads(metadata["frozen"]))
        layers = {i: tensors[f"layers.{i}.state"] for i in shapes}
        skipped = tensors["skipped"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{name}: {path}: a broken memory file: {type(error).__name__} {error}") from error
    _check(path, name, shapes, layers, skipped)
    counters = {i: skipped[n].to(torch.int32) for n, i in enumerate(layers)}
    memory = MemoryState(layers, frozen=frozen, skipped=counters)
    return MemoryFile(path, memory, *(metadata.get(key, "") for key in NAMES))


def _check(path: Path, name: str, shapes: dict, layers: dict[int, torch.Tensor], skipped: torch.Tensor) -> None:
    batch = next((int(state.shape[0]) for state in layers.values() if state.ndim), 0)
    for i, state in layers.items():
        wanted = (batch, *shapes[i])
        fits = state.ndim == 4 and tuple(state.shape) == wanted and state.shape[2] == state.shape[3]
        if not fits or state.dtype != torch.float32:
            raise FileFormatError(
                f"{name}: {path}: layer {i} is {state.dtype} {list(state.shape)}, allowed float32 {list(wanted)}, "
                "[rows, heads, rank, rank]"
            )
    if tuple(skipped.shape) != (len(layers), batch):
        raise FileFormatError(f"{name}: {path}: skipped is {list(skipped.shape)}, allowed [{len(layers)}, {batch}]")
