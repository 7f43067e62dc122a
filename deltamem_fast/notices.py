"""Warnings through the logger ``deltamem_fast``, each cause once a process."""

from __future__ import annotations

import logging

logger = logging.getLogger("deltamem_fast")
_told: set[str] = set()


def warn_once(cause: str, message: str) -> None:
    """Log a warning, unless ``cause`` was warned of before in this process."""
    if cause not in _told:
        _told.add(cause)
        logger.warning(message)
