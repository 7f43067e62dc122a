"""The GPUs to expect: what each is known to reach, for floors in tables and for budgets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """Attributes:
    name: as it is short.
    copy: bytes per second of a copy within its memory, read and written bytes both counted.
    flops: bfloat16 operations per second of a large matrix product.
    processors, clock: multiprocessors, and cycles per second.
    """

    name: str
    copy: float
    flops: float
    processors: int = 132
    clock: float = 1.755e9


KNOWN = (Known("H100", 3.0e12, 798e12), Known("H200", 4.3e12, 790e12))
SLOWEST = min(KNOWN, key=lambda known: known.copy)
