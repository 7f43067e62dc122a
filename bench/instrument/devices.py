"""The GPUs to expect: what each is known to reach, for floors in tables and for budgets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """Attributes:
    name: as it is short, and as it stands in the device's own name.
    copy: bytes per second of a copy within its memory, read and written bytes both counted.
    flops: bfloat16 operations per second of a large matrix product.
    """

    name: str
    copy: float
    flops: float


KNOWN = (Known("H100", 3.0e12, 798e12), Known("H200", 4.3e12, 790e12))
SLOWEST = min(KNOWN, key=lambda known: known.copy)


def of(device: str) -> Known | None:
    """The known device of which ``device`` (as the driver names it) is one, or None."""
    return next((known for known in KNOWN if known.name.lower() in device.lower()), None)


def floors(count: float) -> dict[str, float]:
    """The least seconds in which each known device moves ``count`` bytes, by name."""
    return {known.name: count / known.copy for known in KNOWN}
