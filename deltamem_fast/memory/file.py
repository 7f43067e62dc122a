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
from ..adapter.identity import describe_difference
from ..arguments import MOST, shown
from ..errors import ArgumentError, FileFormatError
from ..storage.files import as_path, check_format, parse_json, write_atomically
from ..storage.tensors import Header, check_seal, read_tensors, save_tensors, seal

FORMAT = "deltamem-memory"
FORMAT_VERSION = 2  # 1 had no checksum, and no fields of the backbone
Shapes = dict[int, tuple[int, ...]]  # layer index → (H, r, r)
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


def check_made_under(
    theirs: Mapping[str, str], ours: Mapping[str, str], adopt: bool, where: str, fitting: str = "its shapes fit"
) -> str:
    """What differs between a file's fingerprints and the model's; "" if nothing. Raises for it unless ``adopt``.

    Args:
        where: what the message begins with, up to the file's adapter and backbone.
    """
    difference = describe_difference(theirs, ours)
    if difference and not adopt:
        raise FileFormatError(f"{where} {difference}; adopt=True takes it all the same, if {fitting}")
    return difference


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
    path: str | os.PathLike, name: str = "path", check: Callable[[dict[str, str], Shapes], None] | None = None
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
    where = f"{name}: {path}"
    shapes: Shapes = {}

    def check_header(metadata: dict[str, str], header: Header) -> None:
        _check_version(metadata, where)
        shapes.update(_shapes(metadata, where))
        _check_tensors(shapes, header, where)
        if metadata.get("frozen") not in ("true", "false"):
            raise FileFormatError(f"{where}: frozen is {metadata.get('frozen')!r:.80}, allowed true and false")
        if check is not None:
            check(metadata, shapes)

    metadata, tensors = read_tensors(path, name, check_header)
    if int(metadata["format_version"]) > 1:
        check_seal(path, name, metadata, tensors)
    layers = {i: tensors[_name(i)] for i in shapes}
    for i, state in layers.items():
        if not bool(state.isfinite().all()):
            raise FileFormatError(f"{where}: damaged: layer {i} holds NaN or Inf")
    counters = tensors[_SKIPPED]
    if bool((counters < 0).any()):
        raise FileFormatError(f"{where}: damaged: skipped holds counts below 0")
    # Each layer's are updated in place, so that none may share storage with another's.
    skipped = {i: counters[n].clone() for n, i in enumerate(layers)}
    return MemoryContent(path, layers, skipped, metadata["frozen"] == "true", metadata)


def _name(layer: int) -> str:
    return f"layers.{layer}.state"


def _check_version(metadata: Mapping[str, str], where: str) -> None:
    check_format(metadata.get("format"), FORMAT, where, "not a memory file")
    version = metadata.get("format_version", "")
    if not re.fullmatch("[0-9]{1,9}", version) or not 1 <= int(version) <= FORMAT_VERSION:
        raise FileFormatError(f"{where}: format version {version!r:.80}, this version reads 1 to {FORMAT_VERSION}")


def _shapes(metadata: Mapping[str, str], where: str) -> Shapes:
    """Layer index → (H, r, r), as the metadata has it."""
    if "layers" not in metadata:
        raise FileFormatError(f"{where}: a broken memory file: its metadata lacks the entry 'layers'")
    said = parse_json(metadata["layers"], f"{where}: its metadata's entry 'layers'")
    for layer, shape in said.items():
        whole = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
        if not re.fullmatch("0|[1-9][0-9]{0,8}", layer) or not whole or shape[1] != shape[2]:
            raise FileFormatError(f"{where}: layer {layer!r:.20} is {shape!r:.80}, allowed [heads, rank, rank]")
    return {int(layer): tuple(shape) for layer, shape in said.items()}


def _check_tensors(shapes: Shapes, header: Header, where: str) -> None:
    """Raise unless the file holds the tensors that its metadata says, all of one batch size, and no other."""
    wanted = {_name(i) for i in shapes} | {_SKIPPED}
    if header.keys() != wanted:
        missing, more = sorted(wanted - header.keys()), sorted(header.keys() - wanted)
        raise FileFormatError(
            f"{where}: a broken memory file: it lacks {missing[:3]}, and has unexpected {more[:3]!s:.300}"
        )
    rows = next((header[_name(i)][1][:1] for i in shapes), (0,))
    allowed = {_name(i): ("F32", (*rows, *shape)) for i, shape in shapes.items()}
    for tensor, (kind, shape) in (allowed | {_SKIPPED: ("I32", (len(shapes), *rows))}).items():
        dtype, sizes = header[tensor]
        if (dtype, sizes) != (kind, shape):
            raise FileFormatError(
                f"{where}: {tensor} is {dtype:.20} {shown(list(sizes))}, allowed {kind} {list(shape)}"
            )
