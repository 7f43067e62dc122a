"""Rows of a benchmark of lm-evaluation-harness from a local file, and what they need to be scored."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, FileMissingError
from ..storage.files import read_bytes
from .records import field, read_records

SENTENCES, HOW = "punkt_tab", "python -m nltk.downloader punkt_tab"  # NLTK's model of sentences
# Of IFEval's 25 instructions the ones that it checks.
WITH_SENTENCES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


def local_rows(name: str, path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The rows of a file: JSON lines, a JSON array of objects, parquet, or CSV.

    Args:
        name: of the benchmark.
        fields: of each row, and of what type.

    Raises:
        ValueError, OSError: the file cannot be read, or a row lacks a field; names the row.
    """
    rows = _csv_rows(path) if path.suffix == ".csv" else read_records(path, "data")
    if not rows:
        raise FileFormatError(f"data: {path}: no row in it, allowed one or more of {name}")
    if name == "hotpotqa":  # LongBench's own files call the question input
        rows = [{"question": row["input"], **row} if isinstance(row.get("input"), str) else row for row in rows]
    for number, row in enumerate(rows, 1):
        for key, kind in fields.items():
            field(row, key, kind, f"data: {path}: row {number}")
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = read_bytes(path, "data").decode("utf-8-sig")
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"data: {path}: not CSV in UTF-8: {error}") from error


def check_sentences(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise OSError if a row of IFEval's needs NLTK's model of sentences, and it is not here."""
    needed = sorted({one for row in rows for one in row["instruction_id_list"] if one in WITH_SENTENCES})
    if not needed:
        return
    import nltk

    try:
        nltk.data.find(f"tokenizers/{SENTENCES}")
    except LookupError as error:
        raise FileMissingError(
            f"ifeval: {', '.join(needed)}: needs NLTK's {SENTENCES}, which is not here; {HOW}"
        ) from error
