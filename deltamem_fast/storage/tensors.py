"""Safetensors files, read so that nothing in them is trusted, and the checksums that seal them.

The one file of this package that needs torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import FileFormatError
from .files import opened, parse_json

_MOST_HEADER_BYTES = 100_000_000  # as safetensors' own library has it
_ENTRY = ("dtype", "shape", "data_offsets")  # of each tensor in a header

FLOATS = ("F64", "F32", "F16", "BF16")  # as a header names them
# A tensor in a file's header: its dtype as safetensors names it, and its shape.
Header = Mapping[str, tuple[str, tuple[int, ...]]]
Check = Callable[[dict[str, str], Header], None]
Content = tuple[dict[str, str], dict[str, torch.Tensor]]  # metadata and tensors


def read_tensors(path: str | os.PathLike, name: str, check: Check | None = None) -> Content:
    """Metadata and tensors, on the CPU, of a safetensors file; the tensors are this process's own, not mapped.

    Args:
        name: the argument that an error names.
        check: is given the metadata and every tensor's dtype and shape before the tensors are read; raises.

    Raises:
        FileMissingError, FileAccessError: see ``read_bytes``.
        FileFormatError: not a safetensors file, or cut short.
    """
    with opened(path, name) as file:
        return _read_tensors(file, os.fstat(file.fileno()).st_size, f"{name}: {path}", check)


def parse_tensors(data: bytes, path: str | os.PathLike, name: str, check: Check | None = None) -> Content:
    """As ``read_tensors``, of the bytes of the file ``path``."""
    return _read_tensors(io.BytesIO(data), len(data), f"{name}: {path}", check)


def read_metadata(path: str | os.PathLike, name: str) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors; errors as ``read_tensors``."""
    with opened(path, name) as file:
        return _read_header(file, os.fstat(file.fileno()).st_size, f"{name}: {path}")[0]


def _read_tensors(file: IO[bytes], size: int, where: str, check: Check | None) -> Content:
    metadata, header, head = _read_header(file, size, where)
    if check is not None:
        check(metadata, header)
    file.seek(0)
    data = file.read(size)
    if not data.startswith(head):  # overwritten in between: what was checked is not what was read
        raise FileFormatError(f"{where}: was changed while it was read")
    try:
        return metadata, safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, or KeyError for a dtype that this torch does not have
        raise FileFormatError(f"{where}: not a safetensors file, or cut short: {error}") from error


def _read_header(file: IO[bytes], size: int, where: str) -> tuple[dict[str, str], Header, bytes]:
    """Metadata, each tensor's dtype and shape, and the bytes that say so, of a file of ``size`` bytes."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if not length <= min(size - 8, _MOST_HEADER_BYTES):
        raise FileFormatError(f"{where}: not a safetensors file, or cut short")
    head = file.read(length)
    entries = parse_json(head, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(f"{where}: not a safetensors file: entry '__metadata__'")
    found, end = {}, 0
    for key, entry in entries.items():
        dtype, shape, offsets = map(entry.get, _ENTRY) if isinstance(entry, dict) else (None, None, None)
        placed = _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2
        if not isinstance(dtype, str) or not placed:
            raise FileFormatError(f"{where}: not a safetensors file: entry {key!r:.80}")
        found[key] = (dtype, tuple(shape))
        end = max(end, offsets[1])
    expected = 8 + length + end
    if size != expected:  # a hole of any size costs its maker nothing
        raise FileFormatError(
            f"{where}: not a safetensors file, or cut short: has {size:,} bytes, its header says {expected:,}"
        )
    return metadata, found, start + head


def _are_sizes(value: Any) -> bool:
    # A file may say a number that is too long to be said again.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """safetensors' ``save_file`` (for ``write_atomically``), whose I/O errors become the OSErrors that they are."""
    try:
        safetensors.torch.save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


# --- checksums


def seal(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over metadata (but its own entry, ``sha256``) and tensors, by name: dtype, shape, bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(metadata.items()):
        if key != "sha256":
            digest.update(json.dumps([key, value]).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def check_seal(
    path: str | os.PathLike, name: str, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raise FileFormatError unless the metadata's ``sha256`` is what ``seal`` gives."""
    if metadata.get("sha256") != seal(metadata, tensors):
        raise FileFormatError(f"{name}: {path}: damaged: its content is not what was written (sha256)")
