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
from typing import IO

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import FileFormatError
from .files import opened, parse_json

_MOST_HEADER_BYTES = 100_000_000  # as safetensors' own library has it

FLOATS = ("F64", "F32", "F16", "BF16")  # as a header names them
# A tensor in a file's header: its dtype as safetensors names it, and its shape.
Header = Mapping[str, tuple[str, tuple[int, ...]]]


def read_tensors(
    path: str | os.PathLike, name: str, check: Callable[[dict[str, str], Header], None] | None = None
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors, on the CPU, of a safetensors file; the tensors are this process's own, not mapped.

    Args:
        name: the argument that an error names.
        check: is given the metadata and every tensor's dtype and shape before the tensors are read; raises.

    Raises:
        FileMissingError, FileAccessError: see ``read_bytes``.
        FileFormatError: not a safetensors file, or cut short.
    """
    with opened(path, name) as file:
        return _read_tensors(file, os.fstat(file.fileno()).st_size, path, name, check)


def parse_tensors(
    data: bytes,
    path: str | os.PathLike,
    name: str,
    check: Callable[[dict[str, str], Header], None] | None = None,
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """As ``read_tensors``, of the bytes of the file ``path``."""
    return _read_tensors(io.BytesIO(data), len(data), path, name, check)


def read_metadata(path: str | os.PathLike, name: str) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors; errors as ``read_tensors``."""
    with opened(path, name) as file:
        metadata, _, _ = _read_header(file, os.fstat(file.fileno()).st_size, path, name)
    return metadata


def _read_tensors(file: IO[bytes], size: int, path, name: str, check) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    metadata, header, head = _read_header(file, size, path, name)
    if check is not None:
        check(metadata, header)
    file.seek(0)
    data = file.read(size)
    if not data.startswith(head):  # overwritten in between: what was checked is not what was read
        raise FileFormatError(f"{name}: {path}: was changed while it was read")
    try:
        return metadata, safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, or KeyError for a dtype that this torch does not have
        raise FileFormatError(f"{name}: {path}: not a safetensors file, or cut short: {error}") from error


def _read_header(file: IO[bytes], size: int, path, name: str) -> tuple[dict[str, str], Header, bytes]:
    """Metadata, each tensor's dtype and shape, and the bytes that say so, of a file of ``size`` bytes."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if not length <= min(size - 8, _MOST_HEADER_BYTES):
        raise FileFormatError(f"{name}: {path}: not a safetensors file, or cut short")
    head = file.read(length)
    metadata, header, end = _parse_header(head, path, name)
    if size != 8 + length + end:  # a hole of any size costs its maker nothing
        raise FileFormatError(
            f"{name}: {path}: not a safetensors file, or cut short: has {size:,} bytes, its header says "
            f"{8 + length + end:,}"
        )
    return metadata, header, start + head


def _parse_header(data: bytes, path: str | os.PathLike, name: str) -> tuple[dict[str, str], Header, int]:
    """Metadata, each tensor's dtype and shape, and how many bytes follow the header."""
    entries = parse_json(data, path, name)
    metadata = entries.pop("__metadata__", None) or {}
    text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    found, end = {}, 0
    for key, entry in entries.items():
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        offsets = entry.get("data_offsets") if sizes else None
        placed = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
        if not isinstance(dtype, str) or not placed or not text:
            raise FileFormatError(f"{name}: {path}: not a safetensors file: entry {key!r}")
        found[key] = (dtype, tuple(shape))
        end = max(end, offsets[1])
    return metadata, found, end


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
