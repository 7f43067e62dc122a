"""How much memory a process holds, and whether it grows."""

from __future__ import annotations

import os
from collections.abc import Sequence
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


def grown(held: Sequence[int]) -> int:
    """Bytes by which a process has grown, 0 or more: the least that it held in the last third of the looks, less the
    least in the third before. What is taken for a while and given back is no growth; what is lost bit by bit is.

    Args:
        held: of looks at equal distances; fewer than three show nothing.
    """
    third = len(held) // 3
    return max(0, min(held[-third:]) - min(held[-2 * third : -third])) if third else 0
