"""Writing files so that nothing is lost: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Have ``write`` produce a file under a temporary name, sync it, and rename it to ``path``.

    A reader sees the old file or the new one, never a part of it; after an error the old one stands.

    Args:
        path: the target; its directory is made if needed.
        write: called with the temporary path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        # mkstemp makes files private; the result has the mode that open() would have given it.
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)
    return path


def write_json(path: str | os.PathLike, value) -> Path:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | os.PathLike) -> dict:
    """Read a JSON object; an error names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, allowed an object")
    return value


def read_tensors(path: str | os.PathLike, name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors, on the CPU, of a safetensors file; ``name`` is the argument that an error names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device="cpu") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{name}: {path}: not a safetensors file, or cut short: {error}") from error


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
