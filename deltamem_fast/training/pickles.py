"""Whether what a checkpoint has pickled is tensors and numbers; nothing in it is run.

The Trainer reads most of it with torch's ``weights_only``, but only when the run has begun and its log was cut. What
FSDP writes in shards it hands to torch.distributed.checkpoint, which unpickles an index and the numbers beside the
tensors as they are, whatever they name.
"""

from __future__ import annotations

import errno
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import FileFormatError

SUFFIXES = (".pt", ".pth", ".bin")
INDEX = ".metadata"  # of a directory of shards
_ALLOWED = "allowed what a run has saved: tensors and numbers"
# What torch.distributed.checkpoint has in an index beside the classes of its own module ``metadata``.
_IN_AN_INDEX = frozenset({
    "collections.OrderedDict", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "torch.Size", "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
})  # fmt: skip
_METADATA = "torch.distributed.checkpoint.metadata"


def check_pickles(checkpoint: Path) -> None:
    """Look through all of a checkpoint's pickles, those in its subdirectories, too.

    Raises:
        ValueError: one is damaged, or names something to run.
        OSError: one cannot be read.
    """
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if path.suffix in SUFFIXES:
            _check(path, str(path), _of_a_random_state() if path.name.startswith("rng_state") else frozenset())
        elif path.name == INDEX:
            for shard, place in _entries(path):
                _check(io.BytesIO(place), str(shard), frozenset())


def _check(file: Path | io.BytesIO, name: str, allowed: frozenset[str]) -> None:
    try:
        source = file if isinstance(file, io.BytesIO) else str(file)
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(source)) - allowed
    except Exception as error:  # of many kinds: it looks through bytes that anybody may have written
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch raises for a cut file
            raise
        raise FileFormatError(f"resume: {name}: got a damaged file, {_ALLOWED}") from error
    if named:
        raise FileFormatError(f"resume: {name}: got {', '.join(sorted(named))[:200]}, {_ALLOWED}")


def _of_a_random_state() -> frozenset[str]:
    """What the Trainer allows in a random state: NumPy's part, as the NumPy that is installed writes it."""
    rebuild, kinds = np.zeros(0).__reduce__()[0], type(np.dtype(np.uint32))
    names = {f"{one.__module__}.{one.__qualname__}" for one in (rebuild, np.ndarray, np.dtype, kinds)}
    return frozenset(names | {"_codecs.encode"})


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if "." not in name:
            if f"{module}.{name}" in _IN_AN_INDEX:
                return super().find_class(module, name)
            found = super().find_class(module, name) if module in ("torch", _METADATA) else None
            if isinstance(found, torch.dtype) or getattr(found, "__module__", "") == _METADATA:
                return found
        raise _Named(f"{module}.{name}")


class _Named(Exception):
    """What an index names, and may not."""


def _entries(index: Path) -> Iterator[tuple[Path, bytes]]:
    """All that a directory of shards holds, each entry's file and bytes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    with index.open("rb") as file:
        try:
            stored = list(_IndexUnpickler(file).load().storage_data.values())
            places = [(one.relative_path, one.offset, one.length) for one in stored if type(one) is _StorageInfo]
            plain = len(places) == len(stored) and not any(
                getattr(one, "transform_descriptors", None) for one in stored
            )
            for name, offset, length in places:
                plain = plain and type(name) is str and name == Path(name).name and name not in ("", "..")
                plain = plain and type(offset) is int and type(length) is int and min(offset, length) >= 0
        except _Named as error:
            raise FileFormatError(f"resume: {index}: got {str(error)[:200]}, {_ALLOWED}") from error
        except Exception as error:
            raise FileFormatError(f"resume: {index}: got a damaged file, {_ALLOWED}") from error
    if not plain:
        raise FileFormatError(f"resume: {index}: got entries in other places or forms, {_ALLOWED}")
    for name, offset, length in places:
        with (index.parent / name).open("rb") as shard:
            shard.seek(offset)
            yield index.parent / name, shard.read(length)
