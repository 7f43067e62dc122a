"""A word that marks what somebody said, and which files hold it."""

from pathlib import Path

WORD = "Quizzaciously"


def files_with(folder: Path, word: str = WORD) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]
