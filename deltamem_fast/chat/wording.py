"""Figures and texts in few words."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """``1 turn``, ``2 turns``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_bytes(size: int) -> str:
    """A size for people: ``4,096 bytes``, ``36.1 kB``, ``2.4 MB``."""
    if size < 10_000:
        return f"{size:,} bytes"
    return next(f"{size / unit:.1f} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit)


def without_surrogates(text: str) -> str:
    """Text whose undecodable bytes, which no tokenizer takes, are question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def shortened(text, most: int = 40) -> str:
    """``text`` (of anything: its str) on one line, cut to at most ``most`` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
