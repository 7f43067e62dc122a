"""What a wheel and a source distribution hold."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .steps import StepFailed

# What is no part of the package, and what a tool has left.
_ROOMS = ("tests", "bench", "examples", "release", "docs", "kernels", "build", "dist")
_LEFT = (".pyc", ".pyo", ".nbi", ".nbc", ".so", ".orig", ".rej", ".swp")


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packaged(tracked: Iterable[str]) -> dict[str, str]:
    """What a wheel has to hold of the files under version control: their names in the wheel → in the repository."""
    found = {}
    for name in tracked:
        if name.startswith("deltamem_fast/"):
            found[name] = name
        elif name.startswith("kernels/deltamem_kernels/"):
            found[name.removeprefix("kernels/")] = name
    return found


def check_wheel(path: Path, tracked: Iterable[str], root: Path | None = None) -> str:
    """Compare a wheel with the files under version control.

    Args:
        root: where those lie, each as it was committed; None: names are compared, not contents.

    Raises:
        StepFailed: one of the packages' files is missing or has other bytes, there is one that is under no version
            control, or the licence is missing.
    """
    sources = packaged(tracked)
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        both = sorted(names & sources.keys()) if root is not None else ()
        if other := [name for name in both if wheel.read(name) != (root / sources[name]).read_bytes()]:
            raise StepFailed(f"{path.name}: has other bytes of {_some(other)}")
    own = {name for name in names if ".dist-info/" not in name}
    wanted = set(sources)
    _compare(path, own, wanted)
    for part in ("licenses/LICENSE", "METADATA", "RECORD", "entry_points.txt"):
        if not any(name.endswith(f".dist-info/{part}") for name in names):
            raise StepFailed(f"{path.name}: no {part}")
    for marker in ("deltamem_fast/py.typed", "deltamem_kernels/py.typed"):
        if marker not in own:
            raise StepFailed(f"{path.name}: no {marker}")
    data = sum(name.startswith("deltamem_fast/data/") for name in own)
    return f"{len(own)} files, {data} of them data; licence, py.typed; nothing else"


def check_sdist(path: Path, tracked: Iterable[str]) -> str:
    """Compare a source distribution with the files under version control.

    Raises:
        StepFailed: it lacks one of the packages' files or of those that build them, or holds one of a room that it
            should not, or one outside its own folder.
    """
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    folder = path.name.removesuffix(".tar.gz")
    odd = [member.name for member in members if not (member.isfile() or member.isdir())]
    odd += [member.name for member in members if PurePosixPath(member.name).parts[0] != folder]
    if odd:
        raise StepFailed(f"{path.name}: neither files nor folders of {folder}: {_some(odd)}")
    names = {member.name.removeprefix(f"{folder}/") for member in members if member.isfile()}
    wanted = set(packaged(tracked).values())
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "PKG-INFO"}
    if missing := wanted - names:
        raise StepFailed(f"{path.name}: lacks {_some(missing)}")
    rooms = {name for name in names - wanted if name.partition("/")[0] in _ROOMS or name.endswith(_LEFT)}
    if rooms:
        raise StepFailed(f"{path.name}: holds {_some(rooms)}")
    return f"{len(names)} files; neither tests nor benchmarks"


def _compare(path: Path, own: set[str], wanted: set[str]) -> None:
    if missing := wanted - own:
        raise StepFailed(f"{path.name}: lacks {_some(missing)}")
    if more := own - wanted:
        raise StepFailed(f"{path.name}: holds {_some(more)}, which is under no version control or of another room")


def _some(names: Iterable[str], most: int = 5) -> str:
    found = sorted(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
