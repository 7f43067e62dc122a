"""How much memory a process holds."""

from __future__ import annotations

import os
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident(process: int | str = "self") -> int:
    """Bytes of physical memory that a process holds, its anonymous pages alone: mapped files come and go by themselves.

    Args:
        process: its id.

    Raises:
        OSError: there is no such process, or no /proc.
    """
    _, pages, shared, *_ = Path(f"/proc/{process}/statm").read_text().split()
    return (int(pages) - int(shared)) * _PAGE
