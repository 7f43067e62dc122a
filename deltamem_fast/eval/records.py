"""Records of a benchmark from a file: JSON, JSON lines, or parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..display import shortened, without_surrogates
from ..errors import FileFormatError, MissingPackageError
from ..storage.files import check_depth, opened, parse_json, read_bytes

ENDINGS = (".json", ".jsonl", ".parquet")


def read_records(path: Path, name: str) -> list[dict[str, Any]]:
    """The records of a file, in its order: a JSON array of objects, JSON lines, or the rows of a parquet table.

    Args:
        path: by its ending .jsonl or .parquet; JSON otherwise.
        name: the argument that errors name.

    Raises:
        FileMissingError, FileAccessError: it cannot be read.
        FileFormatError: it is not what its ending says; a damaged line is told by its number.
        MissingPackageError: a parquet file without pyarrow.
    """
    if path.suffix == ".jsonl":
        return [record for _, record in numbered_lines(read_bytes(path, name), path, name)]
    if path.suffix == ".parquet":
        return _parquet_rows(path, name)
    try:
        value = json.loads(read_bytes(path, name).decode("utf-8-sig"))
        check_depth(value)
    except RecursionError:
        raise FileFormatError(f"{name}: {path}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise FileFormatError(f"{name}: {path}: not JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise FileFormatError(f"{name}: {path}: got a JSON {type(value).__name__}, allowed an array of objects")
    return value


def numbered_lines(data: bytes, path: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number (from 1) and the object of each line of a JSON lines file; empty lines are skipped.

    Raises:
        FileFormatError: a line is not a JSON object; names the file and the line's number.
    """
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}: line {number}", name)


def _parquet_rows(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingPackageError(f"{name}: {path}: needs the package pyarrow; pip install pyarrow") from error
    with opened(path, name):  # a missing file is told as every other
        pass
    try:
        return parquet.read_table(path).to_pylist()
    except (
        ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # of text that is no UTF-8, of impossible dates
        raise FileFormatError(f"{name}: {path}: not a parquet file: {shortened(error, 200)}") from error


def field(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``record[key]``, a text of it without halves of surrogate pairs, which no tokenizer takes.

    Args:
        kind: what it has to be an instance of.
        where: what an error begins with: the argument, the file, and the record in it.

    Raises:
        FileFormatError: ``record`` is no object, has no such key, or another kind of value there.
    """
    if not isinstance(record, Mapping):
        raise FileFormatError(f"{where}: got a JSON {type(record).__name__}, allowed an object")
    if key not in record:
        raise FileFormatError(f"{where}: has no {key!r}")
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        allowed = " or ".join(one.__name__ for one in kinds)
        raise FileFormatError(f"{where}: {key!r}: got a {type(value).__name__}, allowed {allowed}")
    return without_surrogates(value) if isinstance(value, str) else value
