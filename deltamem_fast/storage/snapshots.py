"""A directory that holds one snapshot: a JSON manifest and the data files that it names, replaced as a whole.

Data files get new names, are synced, and only then the manifest that names them is renamed into place: that rename is
the commit. A reader gets the old snapshot or the new one, whenever the writer is killed. The manifest holds a checksum
of each data file and, from format version 2 on, one of itself. Standard library alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ArgumentError, ConflictError, FileFormatError, FileMissingError, StateError, WrongPathKindError
from .files import (
    MOST_JSON_BYTES,
    as_path,
    check_format,
    check_version,
    give_to_owner_of,
    is_leftover,
    json_bytes,
    make_directory,
    naming_files,
    parse_json,
    read_bytes,
    remove_leftover,
    write_atomically,
)
from .locks import HAS_LOCKS, closed_afterwards, lock_until, open_lock, unlock

MANIFEST = "session.json"
SUFFIX = ".safetensors"
HEAD = {"sha256", "format", "format_version", "generation", "files"}  # what the manifest holds beside the content
SEALED = 2  # the first format version whose manifest has a checksum of itself
_DATA_NAME = re.compile(r"[a-z]+-[0-9a-f]{16}\.safetensors")
_OF_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # what it left beside the files of earlier versions
_ENTRY = {"name": str, "bytes": int, "sha256": str}  # of each data file in the manifest
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEAL = re.compile(rb'\{\n  "sha256": "([0-9a-f]{64})",\n')  # how a manifest with a checksum begins
_TRIES = 100
_PATIENCE = 60.0  # seconds that a writer waits for another one
Loaded = TypeVar("Loaded")


def commit(
    directory: str | os.PathLike,
    format_name: str,
    format_version: int,
    content: Mapping[str, Any],
    files: Mapping[str, Callable[[Path], None]],
    *,
    known: MutableMapping[str, int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Replace the snapshot in ``directory`` (made if needed, for this user alone) by a new one.

    Files that are there keep their mode and owner; new ones are for this user alone.

    Args:
        format_name, format_version: of the manifest.
        content: what else the manifest holds; JSON.
        files: name (lower-case letters) → what writes the data file to the path it is given.
        known: the snapshots that the caller has read or written, ``sha256`` of the manifest → generation. Only one of
            these is replaced, and the new one then stands here in its place. None: any is replaced.
        overwrite: replace a snapshot that is not ``known``, or is damaged.

    Returns:
        The directory. Once this returns, the snapshot is on the disk.

    Raises:
        ConflictError: the directory holds a snapshot that is not ``known``; nothing is changed.
        ValueError: ``directory`` is a file, or holds a manifest that is damaged, of another format or of a newer
            version; nothing is changed.
        TypeError, ValueError: ``content`` is not JSON; nothing is changed.
        FileAccessError (an OSError): it cannot be written; the old snapshot stands.
    """
    directory = as_target(directory)
    with naming_files("directory", directory):
        json.dumps(dict(content), allow_nan=False)
        make_directory(directory)
        path = directory / MANIFEST
        if path.is_symlink():  # what it points to lies outside, and would be replaced or made there
            raise WrongPathKindError(f"directory: {path}: a symbolic link, allowed a file")
        with _only_writer(directory) as alone:
            generation, replaced = _replaceable(path, format_name, format_version, known, overwrite)
            _sweep(directory, files, alone)
            try:
                entries = {}
                for name, write in files.items():
                    data = write_atomically(directory / f"{name}-{secrets.token_hex(8)}{SUFFIX}", write)
                    _as_open_as(path, data)
                    entries[name] = {"name": data.name, "bytes": data.stat().st_size, "sha256": digest(data)}
                head = {"format": format_name, "format_version": format_version, "generation": generation + 1}
                manifest, sha256 = _sealed({**head, "files": entries, **content})
                if known is not None:
                    # Before the rename: whatever interrupts it, a snapshot of the caller's own is no conflict.
                    known[sha256] = generation + 1
                write_atomically(path, lambda temporary: temporary.write_bytes(manifest))
                if known is not None:
                    known.pop(replaced, None)  # a copy of it elsewhere is a backup
            finally:
                _sweep(directory, files, alone)
    return directory


def read(
    directory: str | os.PathLike,
    format_name: str,
    format_version: int,
    load: Callable[[dict[str, Any], dict[str, bytes]], Loaded],
) -> Loaded:
    """What ``load`` makes of the snapshot: it gets the manifest and the bytes of the data files, by name, checked.

    The manifest's ``sha256`` names the snapshot; see ``known`` of ``commit``.

    Raises:
        FileMissingError: no snapshot there.
        FileFormatError (a ValueError): of another or a newer format, or damaged; the message names the file.
    """
    directory = as_path(directory, "directory")
    for _ in range(_TRIES):
        data = _manifest(directory)
        try:
            manifest = _parsed(directory / MANIFEST, data, format_name, format_version)
            return load(manifest, _data_files(directory, manifest))
        except (FileMissingError, FileFormatError):
            # A writer may have put the next snapshot in this one's place meanwhile.
            if _manifest(directory) == data:
                raise
    raise StateError(f"directory: {directory}: was replaced {_TRIES} times while it was read")


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_target(directory: str | os.PathLike) -> Path:
    """``directory`` as the Path of a directory, or of nothing yet.

    Raises:
        TypeError, ValueError: it is no path, or a file.
    """
    path = as_path(directory, "directory")
    with naming_files("directory", path):
        if path.exists() and not path.is_dir():
            raise ArgumentError(f"directory: got {path}, which is a file; allowed a directory")
    return path


# --- reading


def _manifest(directory: Path) -> bytes:
    try:
        return read_bytes(directory / MANIFEST, "directory", most=MOST_JSON_BYTES)
    except (FileMissingError, WrongPathKindError):
        if directory.exists() and not directory.is_dir():
            raise WrongPathKindError(f"directory: {directory}: a file, allowed a directory") from None
        if (directory / MANIFEST).exists():
            raise
        raise FileMissingError(f"directory: {directory}: no snapshot there (no {MANIFEST})") from None


def _data_files(directory: Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    """Each file is opened once: what is checked is what is used, whatever becomes of the file meanwhile."""
    found = {}
    for name, entry in manifest["files"].items():
        path = directory / entry["name"]
        try:
            data = read_bytes(path, "directory", most=entry["bytes"])
        except FileMissingError:
            raise FileFormatError(f"directory: {directory}: damaged: {entry['name']} is missing") from None
        except FileFormatError:  # it is longer, and was not read
            data = None
        if data is None or len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise FileFormatError(f"directory: {path}: damaged: not what was written")
        found[name] = data
    return found


def _parsed(path: Path, data: bytes, format_name: str, format_version: int) -> dict[str, Any]:
    """The manifest with its ``sha256``, which names the snapshot, its head checked."""
    manifest = parse_json(data, path, "directory")
    check_format(manifest.get("format"), format_name, f"directory: {path}", "not a snapshot")
    check_version(manifest.get("format_version"), format_version, f"directory: {path}")
    if manifest["format_version"] < SEALED and "sha256" not in manifest:
        manifest["sha256"] = hashlib.sha256(data).hexdigest()
    elif not _seal_holds(data):
        raise FileFormatError(f"directory: {path}: damaged: its content is not what was written (sha256)")
    _check_head(path, manifest)
    return manifest


def _check_head(path: Path, manifest: dict[str, Any]) -> None:
    generation, entries = manifest.get("generation"), manifest.get("files")
    if type(generation) is not int or not 1 <= generation < 2**63:
        raise FileFormatError(f"directory: {path}: generation: got {generation!r:.80}, allowed an integer, 1 or more")
    if not isinstance(entries, dict):
        raise FileFormatError(f"directory: {path}: files: got {type(entries).__name__}, allowed an object")
    for name, entry in entries.items():
        # A name is no way out of the directory, whoever wrote the manifest.
        kinds = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else {}
        if kinds != _ENTRY or not (_DATA_NAME.fullmatch(entry["name"]) and _SHA256.fullmatch(entry["sha256"])):
            raise FileFormatError(f"directory: {path}: damaged: files: {name!r:.80} names no file with its checksum")


def _sealed(manifest: Mapping[str, Any]) -> tuple[bytes, str]:
    """The manifest as bytes that begin with their own sha256, computed with zeros in its place; and that."""
    data = json_bytes({"sha256": "0" * 64, **manifest})
    sha256 = hashlib.sha256(data).hexdigest()
    return data.replace(b"0" * 64, sha256.encode(), 1), sha256


def _seal_holds(data: bytes) -> bool:
    seal = _SEAL.match(data)
    if seal is None:
        return False
    zeros = data[: seal.start(1)] + b"0" * 64 + data[seal.end(1) :]
    return hashlib.sha256(zeros).hexdigest().encode() == seal[1]


# --- writing


def _replaceable(
    path: Path, format_name: str, format_version: int, known: Mapping[str, int] | None, overwrite: bool
) -> tuple[int, str]:
    """Generation (0: none) and sha256 of the snapshot that is there, which may be replaced."""
    try:
        data = read_bytes(path, "directory", most=MOST_JSON_BYTES)
    except FileMissingError:
        return 0, ""
    _check_not_foreign(path, data, format_name, format_version)
    try:
        manifest = _parsed(path, data, format_name, format_version)
    except FileFormatError as error:
        if overwrite:
            return max((known or {}).values(), default=0), ""
        raise FileFormatError(f"{error}; it is not overwritten (overwrite=True does)") from None
    if known is not None and manifest["sha256"] not in known and not overwrite:
        theirs = f"snapshot {manifest['generation']} ({manifest['sha256'][:12]})"
        latest = next(reversed(known), None)
        ours = "none was loaded from or saved to it here"
        if latest is not None:
            ours = f"the last one loaded or saved here is {known[latest]} ({latest[:12]})"
        raise ConflictError(
            f"directory: {path.parent}: holds {theirs}, which others saved; {ours}. Load it, save into another "
            "directory, or overwrite=True replaces it"
        )
    return manifest["generation"], manifest["sha256"]


def _check_not_foreign(path: Path, data: bytes, format_name: str, format_version: int) -> None:
    """Files of others, and of later versions, are not overwritten, whatever is asked for."""
    try:
        manifest = parse_json(data, path)
    except FileFormatError:
        return  # damaged
    name, version = manifest.get("format"), manifest.get("format_version")
    if name != format_name:
        raise FileFormatError(f"directory: {path}: of another format ({name!r:.80}); it is not overwritten")
    if type(version) is int and version > format_version:
        raise FileFormatError(
            f"directory: {path}: of a newer format (version {version}, this version writes {format_version}); "
            "it is not overwritten"
        )


def _as_open_as(manifest: Path, file: Path | int, mode_from: Callable[[int], int] = int) -> None:
    """Give a file the owner and group of its manifest, and the mode that ``mode_from`` makes of the manifest's."""
    with contextlib.suppress(FileNotFoundError):
        found, own = os.stat(manifest), os.stat(file)
        if own.st_nlink > 1:  # it stands elsewhere, too
            return
        mode = mode_from(give_to_owner_of(found, file))
        if mode != stat.S_IMODE(own.st_mode):
            os.chmod(file, mode)


def _lock_mode(manifest_mode: int) -> int:
    """The mode of a lock: whoever may write the snapshot may hold it, and nobody else."""
    return 0o600 | sum(bits for bits in (0o060, 0o006) if manifest_mode & bits == bits)


def _sweep(directory: Path, names: Iterable[str], alone: bool) -> None:
    """Remove data files that the manifest does not name, and what killed writers have left.

    Nothing goes where the manifest cannot be read, and nothing that others may have put there.

    Args:
        names: of the data files.
        alone: the caller holds the lock. Else another may be writing: only what is old goes.
    """
    with contextlib.suppress(OSError, FileFormatError, KeyError, TypeError, AttributeError):
        kept = set()
        if (directory / MANIFEST).exists():
            entries = parse_json((directory / MANIFEST).read_bytes(), directory)["files"]
            kept = {entry["name"] for entry in entries.values()}
        data = rf"(?:{'|'.join(map(re.escape, names))})-[0-9a-f]{{16}}{re.escape(SUFFIX)}"
        for path in directory.iterdir():
            with contextlib.suppress(OSError):  # it takes room and does no other harm
                if is_leftover(path, f"{data}|{re.escape(MANIFEST)}"):
                    # A file was begun under the lock (in a version without folders): its writer is gone.
                    remove_leftover(path) if path.is_dir() or not alone else path.unlink()
                elif path.is_dir() or path.is_symlink() or path.name in kept:
                    continue
                elif re.fullmatch(data, path.name):
                    path.unlink() if alone else remove_leftover(path)
                elif _OF_SAFETENSORS.fullmatch(path.name):
                    remove_leftover(path)


@contextlib.contextmanager
def _only_writer(directory: Path) -> Iterator[bool]:
    """One writer at a time; the lock goes with its process, however that ends. False: there are no locks here.

    Names are unique, so that two writers without a lock can only leave files behind.

    Raises:
        WaitedTooLongError: another one is writing all the time.
    """
    if not HAS_LOCKS:
        yield False
        return
    path = directory / ".lock"
    with closed_afterwards(open_lock(path, "directory", os.O_RDWR | os.O_CREAT)) as lock:
        with contextlib.suppress(PermissionError):  # it is another user's
            _as_open_as(directory / MANIFEST, lock, _lock_mode)
        late = f"directory: {path}: others wrote for {_PATIENCE:g} s"
        alone = lock_until(time.monotonic() + _PATIENCE, lock, 0.005, late)
        try:
            yield alone
        finally:
            if alone:
                unlock(lock)
