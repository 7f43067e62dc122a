"""One reader of what ``torch.save`` makes of named tensors. Nothing in it is executed, and nothing larger than it made.

Such a file is a zip archive, not compressed: ``data.pkl`` names the tensors, ``data/0`` and so on hold their storages.
torch.load believes the sizes that the pickle states; here each is compared with what is there before it is read.
"""

from __future__ import annotations

import contextlib
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FileFormatError, file_error
from ..storage.tensors import Header

_MOST_SIZES = 64  # of a tensor, as torch has it; the product of millions would take for ever
_MOST_NAMES_BYTES = 2**23  # of data.pkl: 36 layers take 50 kB
# Storage class → its dtype, and that dtype's name in a safetensors header.
_STORAGES = {
    "torch DoubleStorage": (torch.float64, "F64"),
    "torch FloatStorage": (torch.float32, "F32"),
    "torch HalfStorage": (torch.float16, "F16"),
    "torch BFloat16Storage": (torch.bfloat16, "BF16"),
    "torch LongStorage": (torch.int64, "I64"),
    "torch IntStorage": (torch.int32, "I32"),
    "torch ShortStorage": (torch.int16, "I16"),
    "torch CharStorage": (torch.int8, "I8"),
    "torch ByteStorage": (torch.uint8, "U8"),
    "torch BoolStorage": (torch.bool, "BOOL"),
    "torch ComplexFloatStorage": (torch.complex64, "C64"),
    "torch ComplexDoubleStorage": (torch.complex128, "C128"),
}
_FUNCTIONS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict")


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    record: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Broken(Exception):
    pass


def read_released(path: Path, name: str, check: Callable[[Header], None]) -> dict[str, torch.Tensor]:
    """Named tensors of a file that ``torch.save`` wrote, on the CPU; tensors of one storage share it.

    Args:
        name: the argument that an error names.
        check: is given every tensor's dtype and shape before the first is read; raises.

    Raises:
        FileAccessError: the file cannot be read.
        FileFormatError: it is damaged, compressed, of torch before 1.6, or holds something else than named tensors,
            each dense and within its storage.
    """
    with contextlib.ExitStack() as stack:
        with _readable(path, name):
            archive = stack.enter_context(zipfile.ZipFile(path))
            records = _records(archive, path.stat().st_size)
            found = _parse(archive.read(records["data.pkl"]))
            if not isinstance(found, dict) or not all(isinstance(part, _Tensor) for part in found.values()):
                raise _Broken("it holds something else than named tensors")
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise _Broken("its numbers are big-endian")
            for key, tensor in found.items():
                _check_bounds(key, tensor, records)
        check({key: (_STORAGES[tensor.storage.kind][1], tensor.shape) for key, tensor in found.items()})
        with _readable(path, name):
            storages = {record: archive.read(records[record]) for record in {t.storage.record for t in found.values()}}
    # frombuffer refuses to be empty
    storages = {key: torch.frombuffer(bytearray(data or bytes(8)), dtype=torch.uint8) for key, data in storages.items()}
    with _readable(path, name):  # sizes of an empty tensor may be too large for torch
        return {
            key: storages[tensor.storage.record]
            .view(_STORAGES[tensor.storage.kind][0])
            .as_strided(tensor.shape, tensor.stride, tensor.offset)
            for key, tensor in found.items()
        }


@contextlib.contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise file_error(error, name, path) from error
    except Exception as error:  # zipfile's are of many kinds: BadZipFile, UnicodeDecodeError, NotImplementedError, …
        raise FileFormatError(f"{name}: {path} cannot be read as weights: {error}") from error


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries without their common folder, all of them stored as they are."""
    entries = archive.infolist()
    folders = {entry.filename.partition("/")[0] for entry in entries}
    found = {entry.filename.partition("/")[2]: entry for entry in entries}
    if len(folders) != 1 or len(found) < len(entries) or "data.pkl" not in found:
        raise _Broken("no archive of torch.save")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise _Broken(f"{entry.filename!r:.80} is compressed or encrypted, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > size:
        raise _Broken("its entries are larger than the file")
    if found["data.pkl"].file_size > _MOST_NAMES_BYTES:
        raise _Broken(f"data.pkl has {found['data.pkl'].file_size:,} bytes, allowed {_MOST_NAMES_BYTES:,}")
    return found


def _check_bounds(key: str, tensor: _Tensor, records: dict[str, zipfile.ZipInfo]) -> None:
    storage = tensor.storage
    stored = storage.numel * _STORAGES[storage.kind][0].itemsize
    if storage.record not in records or records[storage.record].file_size != stored:
        raise _Broken(f"the storage of {key!r:.80} is not there, or of another size")
    numel, last = 1, tensor.offset
    for length, stride in zip(tensor.shape, tensor.stride):
        numel *= length
        last += (length - 1) * stride
    if numel and last >= storage.numel:
        raise _Broken(f"{key!r:.80} reaches beyond its storage")
    if numel > storage.numel:
        raise _Broken(f"{key!r} has {numel:,} numbers, its storage {storage.numel:,}: expanded tensors are not read")


# --- data.pkl


def _parse(data: bytes) -> Any:
    """The value that a pickle of named tensors stands for, worked out instruction by instruction."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        parts = stack[start:]
        del stack[start:]
        return parts

    try:
        for instruction, argument, _ in pickletools.genops(data):
            name = instruction.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"):
                stack.append(argument)
            elif name == "GLOBAL":
                if argument not in _STORAGES and argument not in _FUNCTIONS:
                    raise _Broken(f"it asks for {argument.replace(' ', '.')[:80]}, allowed dense tensors alone")
                stack.append(_Global(argument))
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            elif name in ("SETITEM", "SETITEMS"):
                pairs = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                    if not isinstance(key, str):
                        raise _Broken("it holds something else than named tensors")
                    stack[-1][key] = value
            elif name == "BUILD":  # what an OrderedDict of state_dict has besides
                stack.pop()
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise _Broken("it holds something else than named tensors")
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # cut short, or other values than expected
        raise _Broken(f"data.pkl is damaged: {error}") from error
    raise _Broken("data.pkl is cut short")


_CONSTANTS = {"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}


def _storage(identity: Any) -> _Storage:
    kind, storage, record, _, numel = identity
    if kind != "storage" or storage.name not in _STORAGES or not isinstance(record, str) or not _natural(numel):
        raise _Broken("data.pkl is damaged")
    return _Storage(storage.name, f"data/{record}", numel)


def _call(function: Any, arguments: Any) -> Any:
    if function == _Global("torch._utils _rebuild_tensor_v2"):
        storage, offset, shape, stride, *more = arguments
        numbers = all(isinstance(sizes, tuple) and all(map(_natural, sizes)) for sizes in (shape, stride))
        numbers = numbers and len(shape) == len(stride) <= _MOST_SIZES
        if not (numbers and _natural(offset) and isinstance(storage, _Storage)):
            raise _Broken("data.pkl is damaged")
        if any(more[2:]):  # after requires_grad and hooks: bits that stand for a sign, such as of torch._neg_view
            raise _Broken("a tensor's numbers are stored with another sign than it has: resolve_neg() before saving")
        return _Tensor(storage, offset, shape, stride)
    if function == _Global("torch._utils _rebuild_parameter"):
        return arguments[0]
    if function == _Global("collections OrderedDict") and not arguments:
        return {}
    raise _Broken("data.pkl is damaged")


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
