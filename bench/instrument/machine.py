"""What a result was measured on: processor, versions, commit. No host or user name and no path."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "numba", "triton")


def processor() -> str:
    """The processor's model, as /proc/cpuinfo or the platform names it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str | None:
    """The installed version of ``package``, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said_by(*command: str) -> str | None:
    """What a program prints; None if it is not there, fails or takes too long."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _git(*arguments: str) -> str | None:
    return _said_by("git", "-C", str(ROOT), *arguments)


def commit() -> dict[str, Any]:
    """Short commit of this repository and whether the working tree differs from it; both None outside git.

    A copy without its history is told by the environment: ``DELTAMEM_COMMIT``.
    """
    if os.environ.get("DELTAMEM_COMMIT"):
        return {"commit": os.environ["DELTAMEM_COMMIT"], "dirty": False}
    top = _git("rev-parse", "--show-toplevel")
    short = _git("rev-parse", "--short", "HEAD")
    # An unpacked archive may lie inside somebody else's repository: that one's commit says nothing.
    if top is None or short is None or Path(top).resolve() != ROOT:
        return {"commit": None, "dirty": None}
    # Results are what this writes, so they do not count.
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"commit": short, "dirty": None if changes is None else bool(changes)}


def driver() -> str:
    """The version of the GPU's driver (ROCm's for AMD), or "unknown"."""
    if torch.version.hip:
        return f"rocm{torch.version.hip}"
    versions = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else "unknown"


@functools.cache
def keep_memory() -> bool:
    """Have glibc keep what is freed, from now on; False without glibc. For good: a process's setting.

    Else it returns large tensors' pages to the system and gets them anew, zeroed: up to 100,000 page faults, a tenth
    of a prefill's time, and more for one variant or the other by what is freed just before.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    no_mapping, no_trimming = set_option(-4, 0), set_option(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return bool(no_mapping and no_trimming)


def describe(device: str = "cpu") -> dict[str, Any]:
    """Everything that a timing on ``device`` (``cpu`` or ``cuda``) depends on."""
    gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else processor(),
        "driver": driver() if gpu else None,
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "freed_memory": "kept" if keep_memory.cache_info().currsize and keep_memory() else "the allocator's default",
        **{package: version(package) for package in PACKAGES},
        **commit(),
    }


def slug(text: str) -> str:
    """``text`` as a part of a file name: lower case, without trademarks, clock rates and what repeats."""
    text = re.sub(r"\((r|tm|c)\)|@.*$|\b(cpu|processor)\b", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
