"""Reading and writing files so that nothing is lost, nothing is trusted, and what is private stays so."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..arguments import shown
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    DeltaMemError,
    FileAccessError,
    FileFormatError,
    FileMissingError,
    WrongPathKindError,
    file_error,
)
from .locks import HAS_LOCKS, closed_afterwards, lock_at_once

MOST_JSON_BYTES = 2**28
MOST_JSON_DEPTH = 128  # lists and objects in one another: what is deeper ends in others' RecursionErrors
_OLD = 24 * 3600.0  # seconds after which a leftover is one, where no lock tells
_TEMPORARY = ".tmp"
_LONGEST = 200  # characters of a file's name that its temporary directory has
# A directory has 16 hexadecimal digits in its name; files, of versions before, 8 characters of tempfile.mkstemp.
_LEFTOVER = re.compile(r"\.(.+)\.(?:([0-9a-f]{16})|[a-z0-9_]{8})\.tmp", re.DOTALL)
_SHOWN = 120  # characters of a path that is too long


def state_home() -> Path:
    """Where this user's programs keep what is to stay: XDG_STATE_HOME if that is an absolute path, else
    ``~/.local/state``.

    Raises:
        RuntimeError: there is no home.
    """
    home = os.environ.get("XDG_STATE_HOME", "")
    return Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"


def as_path(path: str | os.PathLike, name: str, *, expand: bool = True) -> Path:
    """A path that a user gave, ``~`` expanded if ``expand``.

    Raises:
        ValueError, TypeError: it can be nobody's path: empty, with a NUL, of a home that nobody has, of another type.
        OSError: nothing can be looked for there: too long, or no right to.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(f"{name}: got {type(path).__name__}, allowed a path")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ArgumentError(f"{name}: got {text!r:.80}, allowed a path")
    try:
        found = Path(path).expanduser() if expand else Path(path)
        os.lstat(found)
    except RuntimeError as error:
        raise ArgumentError(f"{name}: got {text!r:.80}, allowed a path (nobody has that home directory)") from error
    except (UnicodeError, TypeError) as error:
        raise ArgumentError(f"{name}: got {text!r:.80}, allowed a path ({error})") from error
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise file_error(error, name, text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…") from error
    return found


# --- writing


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None], *, private: bool = True) -> Path:
    """Have ``write`` produce a file under a temporary name, sync it, and rename it to ``path``.

    A reader sees the old file or the new one, never a part of it; after an error the old one stands. A file that
    exists keeps its mode and group, and a symbolic link stays one: the file that it points to is replaced. Only a link
    into the blobs of a hub's cache is replaced itself: such a file is named after its content, and others share it.
    What a killed writer of this file has left behind is removed.

    Args:
        path: the target; its directory is made if needed.
        write: called with the temporary path.
        private: a new file (and a new directory) is for this user alone; else as the umask says.

    Raises:
        FileAccessError (an OSError): it cannot be written; names the path.
    """
    path = as_path(path, "path", expand=False)
    with naming_files("path", path):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and target.parent.name == "blobs":
            target = Path(os.path.realpath(path.parent)) / path.name
        if target.exists() and not target.is_file():  # a pipe or a device would be replaced by a file
            found = "a directory" if target.is_dir() else "no plain file"
            raise WrongPathKindError(f"path: {path}: {found}, allowed a file")
        make_directory(target.parent, private=private)
        with _temporary_directory(target) as folder:
            # ``write`` may itself write beside its file and rename; all of that stays in the folder.
            temporary = folder / "file"
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
            mode = stat.S_IMODE(os.stat(temporary).st_mode)
            write(temporary)
            if target.exists():
                mode = give_to_owner_of(os.stat(target), temporary)
            os.chmod(temporary, mode)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        _sync_directory(target.parent)
    return path


def give_to_owner_of(other: os.stat_result, file: Path | int) -> int:
    """Give a file the owner and group of another, as far as this user may; returns the mode that it may have then.

    That is the other's mode, without its group's rights where the file belongs to a group that they were not meant for.
    """
    own, mode = os.stat(file), stat.S_IMODE(other.st_mode)
    if hasattr(os, "chown") and (other.st_uid, other.st_gid) != (own.st_uid, own.st_gid):
        for owner in (other.st_uid, -1):  # root may give a file to its user, others to a group of theirs
            with contextlib.suppress(OSError):
                os.chown(file, owner, other.st_gid)
                break
        else:
            mode &= ~stat.S_IRWXG
    return mode


def make_directory(path: str | os.PathLike, *, private: bool = True) -> Path:
    """Make a directory and what is missing above it, each ``private`` (0700) or as the umask says."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700 if private else 0o777, exist_ok=True)
    if not path.is_dir():
        raise WrongPathKindError(f"path: {path}: a file, allowed a directory")
    return path


@contextlib.contextmanager
def _temporary_directory(target: Path) -> Iterator[Path]:
    """A private directory beside ``target``, gone afterwards; those that killed processes have left go first."""
    _sweep(target)
    while True:
        folder = target.with_name(f".{target.name[:_LONGEST]}.{secrets.token_hex(8)}{_TEMPORARY}")
        folder.mkdir(mode=0o700)
        lock = _lock(folder)
        if lock is None or _holds(lock, folder):  # else another writer took it for a leftover, before it was locked
            break
        os.close(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _sweep(target: Path) -> None:
    """Remove what writers of ``target`` that were killed have left; those that still write hold a lock."""
    with contextlib.suppress(OSError):  # it takes room and does no other harm
        for path in target.parent.iterdir():
            with contextlib.suppress(OSError):
                if is_leftover(path, f"{re.escape(target.name[:_LONGEST])}|{re.escape(target.name)}"):
                    remove_leftover(path)


def is_leftover(path: Path, names: str) -> bool:
    """Whether ``path`` is called, and is, what a killed ``write_atomically`` leaves: of nobody else's making.

    Args:
        names: a regular expression for the names of the files that were to be written.
    """
    found = _LEFTOVER.fullmatch(path.name)
    if found is None or not re.fullmatch(names, found[1], re.DOTALL):
        return False
    mode = path.lstat().st_mode
    return stat.S_ISDIR(mode) if found[2] else mode == stat.S_IFREG | 0o600  # as tempfile.mkstemp makes it


def remove_leftover(path: Path) -> None:
    """Remove what a killed ``write_atomically`` has left, unless its writer lives (BlockingIOError)."""
    if not path.is_dir() or path.is_symlink() or not HAS_LOCKS:
        # A file: of versions that wrote without a folder.
        if time.time() - path.lstat().st_mtime > _OLD:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    with closed_afterwards(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as lock:
        lock_at_once(lock)
        shutil.rmtree(path)


def _lock(folder: Path) -> int | None:
    if not HAS_LOCKS:
        return None
    with contextlib.suppress(FileNotFoundError):
        lock = os.open(folder, os.O_RDONLY)
        try:
            lock_at_once(lock)
            return lock
        except BlockingIOError:  # a sweeper was quicker, and is about to remove it
            os.close(lock)
        except OSError:  # a file system without locks
            return lock
    return os.open(os.devnull, os.O_RDONLY)  # it is gone, or will be: ``_holds`` says so


def _holds(lock: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder))
    except FileNotFoundError:
        return False


def write_text(path: str | os.PathLike, text: str, *, private: bool = True) -> Path:
    """Write ``text`` as UTF-8, atomically; half a surrogate pair, which UTF-8 cannot hold, becomes "?"."""
    data = text.encode("utf-8", "replace")
    return write_atomically(path, lambda temporary: temporary.write_bytes(data), private=private)


def write_json(path: str | os.PathLike, value, *, private: bool = True) -> Path:
    """Write ``value`` as indented JSON, atomically.

    Raises:
        TypeError, ValueError: it is not JSON (NaN and Inf are not); nothing is written.
    """
    return write_atomically(path, lambda temporary: temporary.write_bytes(json_bytes(value)), private=private)


def json_bytes(value) -> bytes:
    """``value`` as indented JSON in UTF-8. Half a surrogate pair is written as its escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("ascii")


# --- reading


@contextlib.contextmanager
def naming_files(name: str, path: str | os.PathLike) -> Iterator[None]:
    """The operating system's errors inside come out as ours, which name the argument and the path."""
    try:
        yield
    except FileAccessError:
        raise
    except OSError as error:
        raise file_error(error, name, path) from error
    except ValueError as error:
        if isinstance(error, DeltaMemError) or "null" not in str(error):
            raise
        raise ArgumentError(f"{name}: got {os.fspath(path)!r:.80}, allowed a path (no NUL in it)") from error


def read_bytes(path: str | os.PathLike, name: str = "path", *, most: int | None = None) -> bytes:
    """All of a file; ``name`` is the argument that an error names.

    Raises:
        FileMissingError: there is none.
        FileAccessError: it cannot be read, or is no plain file.
        FileFormatError: it has more than ``most`` bytes.
    """
    with opened(path, name) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise FileFormatError(f"{name}: {path}: has {size:,} bytes, allowed at most {most:,}")
        return file.read()


@contextlib.contextmanager
def opened(path: str | os.PathLike, name: str) -> Iterator[BinaryIO]:
    """A plain file, open to be read; errors as ``read_bytes``."""
    with naming_files(name, path):
        try:
            kind = os.stat(path).st_mode
        except FileNotFoundError:
            raise file_error(FileNotFoundError(errno.ENOENT, "no such file"), name, path) from None
        except ValueError as error:  # NUL in the path
            raise FileMissingError(f"{name}: {path!r:.80}: no such file: {error}") from None
        # A pipe or a device would never end.
        if not stat.S_ISREG(kind):
            raise WrongPathKindError(f"{name}: {path}: not a file" + (" but a directory" * stat.S_ISDIR(kind)))
        with open(path, "rb") as file:
            yield file


def read_json(path: str | os.PathLike, name: str = "") -> dict:
    """Read a JSON object.

    Raises:
        FileMissingError, FileAccessError: see ``read_bytes``.
        FileFormatError (a ValueError): not a JSON object, or one with NaN, Inf, or nested more than ``MOST_JSON_DEPTH``
            times; names the file.
    """
    return parse_json(read_bytes(path, name or "path", most=MOST_JSON_BYTES), path, name)


def parse_json(data: bytes | str, path: str | os.PathLike, name: str = "") -> dict:
    """A JSON object from the bytes of the file ``path``; errors as ``read_json``."""
    where = f"{name}: {path}" if name else f"{path}"
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=unique_keys)
        check_depth(value)
    except RecursionError:
        raise FileFormatError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise FileFormatError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{where}: got a JSON {type(value).__name__}, allowed an object")
    return value


def check_depth(value: Any) -> None:
    """Raise RecursionError, as Python's reader of JSON does, for lists and dicts more than ``MOST_JSON_DEPTH`` deep.

    Python's own limit leaves a value that its ``repr`` and ``json.dumps``, some calls further in, cannot go through.
    """
    level = [value]
    for _ in range(MOST_JSON_DEPTH + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
    raise RecursionError("nested too deeply")


def check_format(found: Any, wanted: str, where: str, what: str) -> None:
    """Raise FileFormatError, beginning with ``where`` and saying ``what`` the file is not, unless its format fits."""
    if found != wanted:
        raise FileFormatError(f"{where}: {what} (format {shown(found)}, allowed {wanted!r})")


def check_version(version: Any, most: int, where: str) -> None:
    """Raise FileFormatError, beginning with ``where``, unless a format version is an integer from 1 to ``most``."""
    if type(version) is not int or not 1 <= version <= most:
        raise FileFormatError(f"{where}: format version {shown(version)}, this version reads 1 to {most}")


def _refuse_constant(text: str):
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond every float")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """For ``json.loads``: an object from its pairs; raises ValueError for a key that stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r:.80} stands there twice, allowed once")
    return found


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    with closed_afterwards(os.open(directory, os.O_RDONLY)) as handle:
        os.fsync(handle)
