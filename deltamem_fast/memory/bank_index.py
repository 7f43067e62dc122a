"""The index of a bank's export: which file holds whose memories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import DeltaMemError, FileFormatError
from ..storage.bank_ids import check_ids
from ..storage.files import check_format, check_version, read_json, write_json

INDEX = "index.json"
FORMAT = "deltamem-bank-export"
FORMAT_VERSION = 3  # 1 had no checksums, 2 those of whole files


class ExportedFile(NamedTuple):
    """A file of memories beside the index.

    Attributes:
        name: of the file.
        ids: of its rows, in order.
        sha256: as the file's own metadata has it; None: the index is of a version before, and does not name it.
    """

    name: str
    ids: list[str]
    sha256: str | None


def write_index(directory: Path, files: Sequence[ExportedFile]) -> None:
    """Write the index, atomically."""
    entries = [{"file": file.name, "sha256": file.sha256, "ids": file.ids} for file in files]
    index = {"format": FORMAT, "format_version": FORMAT_VERSION, "files": entries, "sha256": _digest_of(entries)}
    write_json(directory / INDEX, index)


def read_index(directory: Path) -> list[ExportedFile]:
    """The files that the index of an export names.

    Raises:
        FileMissingError: there is none.
        FileFormatError: it is not as ``write_index`` wrote it.
    """
    path = directory / INDEX
    index = read_json(path, "directory")
    check_format(index.get("format"), FORMAT, f"directory: {path}", "no export of a bank")
    version = index.get("format_version")
    check_version(version, FORMAT_VERSION, f"directory: {path}")
    files = index.get("files")
    for file in files if isinstance(files, list) else [None]:
        # The index may come from elsewhere: only files beside it are read.
        name = file.get("file") if isinstance(file, dict) else None
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise FileFormatError(f"directory: {path}: got {file!r:.80}, allowed the name of a file beside it, and ids")
        if version > 1 and not isinstance(file.get("sha256"), str):
            raise FileFormatError(f"directory: {path}: {name:.80} has no sha256")
        if not isinstance(file.get("ids"), list):
            raise FileFormatError(f"directory: {path}: ids: got a {type(file.get('ids')).__name__}, allowed a list")
    try:
        check_ids([id for file in files for id in file["ids"]], f"directory: {path}: ids")
    except DeltaMemError as error:
        raise FileFormatError(str(error)) from error
    if version > 1 and index.get("sha256") != _digest_of(files):
        raise FileFormatError(f"directory: {path}: damaged: its content is not what was written (sha256)")
    return [ExportedFile(file["file"], file["ids"], file.get("sha256") if version > 2 else None) for file in files]


def _digest_of(files: list[dict]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
