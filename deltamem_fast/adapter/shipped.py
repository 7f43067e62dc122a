"""The adapters that lie in the package, by name."""

from __future__ import annotations

from pathlib import Path

_DATA = Path(__file__).parent.parent / "data"
# Name → directory. A name is that of its model, then the write strategy.
SHIPPED = {f"smollm2/{strategy}": _DATA / "smollm2" / f"{strategy}-r8" for strategy in ("tsw", "ssw", "msw")}


def shipped_for(model: str) -> str | None:
    """The name of the adapter that a shipped model's name stands for where none is given; None: there is none."""
    name = f"{model}/msw"
    return name if name in SHIPPED else None
