"""The file of a memory: safetensors with a float32 [B, H, r, r] state per layer and int32 [layers, B] counters."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter.fingerprints import public_label
from ..arguments import MOST
from ..errors import ArgumentError, FileFormatError
from ..storage.files import as_path, parse_json, write_atomically
from ..storage.tensors import Header, check_seal, read_tensors, save_tensors, seal

FORMAT = "deltamem-memory"
FORMAT_VERSION = 2  # 1 had no checksum, and no fields of the backbone
NAMES = ("adapter_name", "adapter_fingerprint", "backbone_name", "backbone_fingerprint")
_SKIPPED = "skipped"


@dataclass(frozen=True)
class MemoryContent:
    """What a file holds, checked; no model is needed for it, and no fingerprint compared.

    Attributes:
        path: of the file.
        layers: layer index → float32 [B, H, r, r], finite; each with storage of its own.
        skipped: layer index → int32 [B], 0 or more.
        fingerprints: what the file says of adapter and backbone, and its other metadata.
    """

    path: Path
    layers: dict[int, torch.Tensor]
    skipped: dict[int, torch.Tensor]
    frozen: bool
    fingerprints: dict[str, str]

    @property
    def rows(self) -> int:
        """B, the number of conversations."""
        return next((state.shape[0] for state in self.layers.values()), 0)

    @property
    def names(self) -> dict[str, str]:
        """Name and fingerprint of the adapter and of the backbone that it was made with; "" where it does not say."""
        said = {key: self.fingerprints.get(key, "") for key in NAMES}
        # Versions before wrote paths.
        return said | {key: public_label(value) for key, value in said.items() if key.endswith("_name")}

    @property
    def made_with(self) -> str:
        """Adapter and backbone in words, with the beginning of their fingerprints."""
        names = self.names
        adapter = f"adapter {names['adapter_name']} ({names['adapter_fingerprint'][:12]})"
        return f"{adapter} on {names['backbone_name']} ({names['backbone_fingerprint'][:12]})"


def write_memory(
    path: str | os.PathLike,
    layers: Mapping[int, torch.Tensor],
    skipped: Mapping[int, torch.Tensor],
    frozen: bool,
    fingerprints: Mapping[str, str],
) -> Path:
    """Write a memory, atomically; a new file is its user's alone.

    Raises:
        ValueError, TypeError: a state is not finite, or on the meta device; what can be no path; nothing is written.
        OSError: it cannot be written; an old file stands.
    """
    path = as_path(path, "path")
    tensors = {_name(i): state.detach().contiguous() for i, state in layers.items()}
    for name, state in tensors.items():
        if state.is_meta:
            raise ArgumentError(f"memory: {name} is on the meta device, where it has no values")
        if state.dtype != torch.float32:
            raise ArgumentError(f"memory: {name} is {state.dtype}, allowed torch.float32; nothing was written")
        tensors[name] = state.cpu()
        if not bool(tensors[name].isfinite().all()):
            raise ArgumentError(f"memory: {name} holds NaN or Inf, which a file must not; nothing was written")
    counters = [counter.detach().cpu() for counter in skipped.values()]
    tensors[_SKIPPED] = torch.zeros(0, 0, dtype=torch.int32, device="cpu")
    if counters:
        tensors[_SKIPPED] = whole_counts(torch.stack(counters))
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "layers": json.dumps({str(i): list(state.shape[1:]) for i, state in layers.items()}),
        "frozen": json.dumps(bool(frozen)),  # users may have set it to anything that is true or not
        **fingerprints,
    }
    metadata["sha256"] = seal(metadata, tensors)
    return write_atomically(path, lambda temporary: save_tensors(tensors, temporary, metadata))


def whole_counts(counters: torch.Tensor) -> torch.Tensor:
    """int32 counts of skipped tokens, each 0 or more: one that has gone past the last int32 stays at it."""
    return counters.where(counters >= 0, MOST)


def read_memory(
    path: str | os.PathLike,
    name: str = "path",
    check: Callable[[dict[str, str], dict[int, tuple[int, ...]]], None] | None = None,
) -> MemoryContent:
    """Read a memory of either version onto the CPU.

    Args:
        name: the argument that an error names.
        check: is given the metadata and each layer's (H, r, r) before a tensor is read; raises.

    Raises:
        FileMissingError, FileAccessError (each an OSError): there is none, or it cannot be read.
        FileFormatError (a ValueError): not a memory file, of a newer format, or damaged; names the file.
    """
    path = as_path(path, name)
    found: dict = {}

    def check_header(metadata: dict[str, str], header: Header) -> None:
        version = _check_version(path, name, metadata)
        shapes = _shapes(path, name, metadata)
        _check_tensors(path, name, shapes, header)
        frozen = metadata.get("frozen")
        if frozen not in ("true", "false"):
            raise FileFormatError(f"{name}: {path}: frozen is {frozen!r}, allowed true and false")
        if check is not None:
            check(metadata, shapes)
        found.update(version=version, shapes=shapes, frozen=frozen == "true")

    metadata, tensors = read_tensors(path, name, check_header)
    if found["version"] > 1:
        check_seal(path, name, metadata, tensors)
    layers = {i: tensors[_name(i)] for i in found["shapes"]}
    for i, state in layers.items():
        if not bool(state.isfinite().all()):
            raise FileFormatError(f"{name}: {path}: damaged: layer {i} holds NaN or Inf")
    counters = tensors[_SKIPPED]
    if bool((counters < 0).any()):
        raise FileFormatError(f"{name}: {path}: damaged: skipped holds counts below 0")
    # Each layer's are updated in place, so that none may share storage with another's.
    skipped = {i: counters[n].clone() for n, i in enumerate(layers)}
    return MemoryContent(path, layers, skipped, found["frozen"], metadata)


def _name(layer: int) -> str:
    return f"layers.{layer}.state"


def _check_version(path, name: str, metadata: Mapping[str, str]) -> int:
    if metadata.get("format") != FORMAT:
        raise FileFormatError(
            f"{name}: {path}: not a memory file (format {metadata.get('format')!r}, allowed {FORMAT!r})"
        )
    version = metadata.get("format_version", "")
    if not re.fullmatch("[0-9]{1,9}", version) or not 1 <= int(version) <= FORMAT_VERSION:
        raise FileFormatError(f"{name}: {path}: format version {version!r}, this version reads 1 to {FORMAT_VERSION}")
    return int(version)


def _shapes(path, name: str, metadata: Mapping[str, str]) -> dict[int, tuple[int, ...]]:
    """Layer index → (H, r, r), as the metadata has it."""
    if "layers" not in metadata:
        raise FileFormatError(f"{name}: {path}: a broken memory file: its metadata lacks the entry 'layers'")
    said = parse_json(metadata["layers"], f"{path}: its metadata's entry 'layers'", name)
    for layer, shape in said.items():
        whole = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
        if not re.fullmatch("0|[1-9][0-9]{0,8}", layer) or not whole or shape[1] != shape[2]:
            raise FileFormatError(
                f"{name}: {path}: layer {layer!r} is said to be {shape!r}, allowed [heads, rank, rank]"
            )
    return {int(layer): tuple(shape) for layer, shape in said.items()}


def _check_tensors(path, name: str, shapes: Mapping[int, tuple[int, ...]], header: Header) -> None:
    """Raise unless the file holds the tensors that its metadata says, all of one batch size, and no other."""
    wanted = {_name(i) for i in shapes} | {_SKIPPED}
    if header.keys() != wanted:
        missing, more = sorted(wanted - header.keys()), sorted(header.keys() - wanted)
        raise FileFormatError(
            f"{name}: {path}: a broken memory file: it lacks {missing[:3]}, and has unexpected {more[:3]}"
        )
    rows = next((header[_name(i)][1][:1] for i in shapes), (0,))
    for tensor, kind, shape in (
        *((_name(i), "F32", (*rows, *shape)) for i, shape in shapes.items()),
        (_SKIPPED, "I32", (len(shapes), *rows)),
    ):
        if header[tensor] != (kind, shape):
            raise FileFormatError(
                f"{name}: {path}: {tensor} is {header[tensor][0]} {list(header[tensor][1])}, allowed {kind} "
                f"{list(shape)}"
            )
