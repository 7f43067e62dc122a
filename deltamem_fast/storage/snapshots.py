"""A directory that holds one snapshot: a JSON manifest and the data files that it names, replaced as a whole.

Data files get new names, are synced, and only then the manifest that names them is renamed into place: that rename is
the commit. A reader gets the old snapshot or the new one, whenever the writer is killed. Standard library alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ArgumentError, FileFormatError, FileMissingError
from ..files import read_json, remove_leftover, write_atomically, write_json

MANIFEST = "session.json"
SUFFIX = ".safetensors"
_OURS = re.compile(r"\.?[a-z]+-[0-9a-f]{16}\.safetensors(\..*\.tmp)?|\.session\.json\..*\.tmp")
Loaded = TypeVar("Loaded")


def commit(
    directory: str | os.PathLike,
    format_name: str,
    format_version: int,
    content: Mapping[str, Any],
    files: Mapping[str, Callable[[Path], None]],
) -> Path:
    """Replace the snapshot in ``directory`` (made if needed) by a new one.

    Args:
        format_name, format_version: of the manifest.
        content: what else the manifest holds; JSON.
        files: name (lower-case letters) → what writes the data file to the path it is given.

    Returns:
        The directory. Once this returns, the snapshot is on the disk.

    Raises:
        ValueError: the directory holds a manifest of another format; nothing is changed.
        TypeError: ``content`` is not JSON; nothing is changed.
        OSError: it cannot be written; the old snapshot stands.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ArgumentError(f"directory: got {directory}, which is a file; allowed a directory")
    json.dumps(dict(content))
    directory.mkdir(parents=True, exist_ok=True)
    with _only_writer(directory):
        generation = _generation(directory, format_name) + 1
        entries = {}
        for name, write in files.items():
            path = write_atomically(directory / f"{name}-{secrets.token_hex(8)}{SUFFIX}", write)
            entries[name] = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}
        head = {"format": format_name, "format_version": format_version, "generation": generation, "files": entries}
        write_json(directory / MANIFEST, head | dict(content))
        _sweep(directory, {entry["name"] for entry in entries.values()})
    return directory


def read(
    directory: str | os.PathLike,
    format_name: str,
    format_version: int,
    load: Callable[[dict[str, Any], dict[str, Path]], Loaded],
) -> Loaded:
    """What ``load`` makes of the snapshot: it gets the manifest and the checked data files, by name.

    Raises:
        FileNotFoundError: no snapshot there.
        ValueError: of another or a newer format, or damaged; the message names the file.
    """
    directory = Path(directory)
    while True:
        path = directory / MANIFEST
        if not path.is_file():
            raise FileMissingError(f"directory: {directory}: no snapshot there (no {MANIFEST})")
        manifest = read_json(path)
        _check_format(path, manifest, format_name, format_version)
        try:
            return load(manifest, _checked_files(directory, manifest))
        except (FileNotFoundError, ValueError):
            # A writer may have put the next snapshot in this one's place meanwhile.
            if read_json(path).get("generation") == manifest.get("generation"):
                raise


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked_files(directory: Path, manifest: dict[str, Any]) -> dict[str, Path]:
    found = {}
    for name, entry in manifest["files"].items():
        path = directory / entry["name"]
        # A name is no way out of the directory, whoever wrote the manifest.
        if Path(entry["name"]).name != entry["name"] or not path.is_file():
            raise FileFormatError(f"directory: {directory}: damaged: {entry['name']} is missing")
        if path.stat().st_size != entry["bytes"] or digest(path) != entry["sha256"]:
            raise FileFormatError(f"directory: {path}: damaged: not what was written")
        found[name] = path
    return found


def _check_format(path: Path, manifest: dict[str, Any], name: str, version: int) -> None:
    if manifest.get("format") != name:
        raise FileFormatError(
            f"directory: {path}: not a snapshot (format {manifest.get('format')!r}, allowed {name!r})"
        )
    found = manifest.get("format_version")
    if not isinstance(found, int) or not 1 <= found <= version:
        raise FileFormatError(f"directory: {path}: format version {found!r}, this version reads 1 to {version}")


def _generation(directory: Path, format_name: str) -> int:
    path = directory / MANIFEST
    if not path.exists():
        return 0
    manifest = read_json(path)
    if manifest.get("format") != format_name:
        raise FileFormatError(
            f"directory: {path}: of another format ({manifest.get('format')!r}); it is not overwritten"
        )
    return int(manifest.get("generation", 0))


def _sweep(directory: Path, kept: set[str]) -> None:
    """Remove data files of earlier snapshots, and what a killed writer has left."""
    for path in directory.iterdir():
        if path.name not in kept and _OURS.fullmatch(path.name):
            with contextlib.suppress(OSError):  # it takes room and does no other harm
                remove_leftover(path) if path.suffix == ".tmp" else path.unlink()


@contextlib.contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with its process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: names are unique, so that two writers there can only leave files behind
        yield
        return
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
