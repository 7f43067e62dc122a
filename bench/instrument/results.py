"""Result files: rows, and everything that they depend on."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltamem_fast.storage.files import read_json, write_json

from . import machine
from .rows import Row, from_dict

FORMAT_VERSION = 2
DIRECTORY = machine.ROOT / "bench" / "results"
KEYS = ("device", "driver", "torch", "triton", "commit", "dirty", "time", "arguments")


@dataclass
class Result:
    """One result file.

    Attributes:
        head: device, versions, commit, UTC time and arguments; see ``machine.describe``.
        rows: what was measured.
    """

    head: dict[str, Any]
    rows: list[Row]

    @property
    def whole(self) -> bool:
        """Whether it is a full run: nothing small, nothing left out by an argument, torch's own threads."""
        arguments = self.head["arguments"]
        return not any(arguments.get(key) for key in ("quick", "dry_run", "only", "threads"))


def collect(rows: Sequence[Row], on: str, arguments: dict[str, Any], **more: Any) -> Result:
    """A result measured just now ``on`` a device (``cpu`` or ``cuda``); ``more`` is for its head."""
    time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    head = {"format_version": FORMAT_VERSION, **machine.describe(on), "time": time, "arguments": arguments}
    return Result(head | more, list(rows))


def file_name(result: Result) -> str:
    """A name that tells devices, versions and commits apart, and partial results from whole ones."""
    head, arguments = result.head, result.head["arguments"]
    parts = ["cpu"] if head["driver"] is None else []
    parts.append(machine.slug(head["device"]))
    parts += [f"driver{head['driver']}"] if head["driver"] else []
    parts.append(f"torch{str(head['torch']).split('+')[0]}")
    parts += [f"triton{head['triton']}"] if head["triton"] else []
    parts.append(str(head["commit"] or "unknown") + ("-changed" if head["dirty"] else ""))
    parts += [f"threads{arguments['threads']}"] if arguments.get("threads") else []
    only = arguments.get("only")
    parts += [only if isinstance(only, str) else "-".join(only)] if only else []
    parts += [word for key, word in (("quick", "quick"), ("dry_run", "dry-run")) if arguments.get(key)]
    return "-".join(parts) + ".json"


def write(directory: Path, result: Result) -> Path:
    """Write a result under its name in ``directory``; returns the path."""
    data = result.head | {"rows": [row.to_dict() for row in result.rows]}
    return write_json(directory / file_name(result), data, private=False)


def load(path: str | Path) -> Result:
    """Read a result file.

    Raises:
        ValueError, OSError: it cannot be read or is no result; the message names the file.
    """
    data = read_json(path)
    if data.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {data.get('format_version')!r}, allowed {FORMAT_VERSION}")
    rows = data.pop("rows", None)
    missing = sorted(set(KEYS) - set(data))
    if missing or not isinstance(rows, list):
        raise ValueError(f"{path}: no result of a benchmark, {', '.join(missing) or 'rows'} missing")
    try:
        return Result(data, [from_dict(row) for row in rows])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def newest(directory: Path = DIRECTORY) -> list[Result]:
    """The newest whole result of each device, GPUs first, of them the one that was measured last.

    What it had no time for comes from earlier results of the device; such a row's note names its commit.

    Raises:
        ValueError, OSError: a file there cannot be read.
    """
    found: dict[str, list[Result]] = {}
    for path in sorted(directory.glob("*.json")):
        result = load(path)
        if result.whole:
            found.setdefault(result.head["device"], []).append(result)
    by_age = (sorted(every, key=lambda result: result.head["time"], reverse=True) for every in found.values())
    newest = [functools.reduce(_filled, every) for every in by_age]
    newest.sort(key=lambda result: result.head["time"], reverse=True)
    return sorted(newest, key=lambda result: result.head["driver"] is None)


# The names of the rows that a part of a run on a GPU makes, by the part's; else its own.
KINDS = {
    "decode": ("prefill", "decode"),
    "scan-peers": ("scan", "scan-gradient"),
    "kernels": ("copy", "kernel"),
    "compiled": ("decode",),
    "compiled-kernels": ("compiled-reference",),
}


def _filled(result: Result, earlier: Result) -> Result:
    """``result`` with an earlier one's rows of parts that it cut off or left out, if made with the same software."""
    if any(result.head[key] != earlier.head[key] for key in ("driver", "torch", "triton")):
        return result
    parts = [row.name for row in result.rows if row.status == "absent" and not row.parameters]
    kinds = {kind for part in parts for kind in KINDS.get(part, (part,))}
    there = {row.key for row in result.rows if row.status != "absent"}
    said = f"of commit {earlier.head['commit']}" + " with changes" * bool(earlier.head["dirty"])
    rows = [row for row in earlier.rows if row.status == "measured" and row.kind in kinds]
    rows = [replace(row, note=f"{said}; {row.note}" if row.note else said) for row in rows if row.key not in there]
    found = {row.key for row in rows}
    return Result(result.head, [row for row in result.rows if row.key not in found] + rows)


def latest(directory: Path) -> Result | None:
    """The newest whole result of all devices there, or None.

    Raises:
        ValueError, OSError: a file there cannot be read.
    """
    return max(newest(directory), key=lambda result: result.head["time"], default=None)


def heading(result: Result) -> str:
    """What was measured on, in a line of Markdown."""
    head = result.head
    commit = (head["commit"] or "unknown") + (" with changes" if head["dirty"] else "")
    names = ("torch", "triton", "transformers", "numba")
    versions = ", ".join(f"{name} {head[name]}" for name in names if head.get(name))
    if head["driver"]:
        place = f"**{head['device']}**, driver {head['driver']}, {head['processor']} with {head['cores']} cores"
    else:
        place = f"**{head['device']}**, {head['cores']} cores, {head['threads']} threads"
    if head.get("freed_memory") == "kept":
        place += ", freed memory kept by the process"
    return f"{place}; {versions}; commit {commit}; {head['time'][:10]}"
