"""How much memory reading a small input may take."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

MOST_VIRTUAL = 2**30  # bytes that may be asked for at once, on top of what the process has
MOST_RESIDENT = 2**28  # bytes by which the process may come to hold more than ever before


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Inside, an allocation of a gigabyte fails, used or not; a quarter of one that was in use is told at the end.

    Raises:
        AssertionError: the process has come to hold far more than before.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_VIRTUAL, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert more <= MOST_RESIDENT, f"small inputs took {more:,} bytes"
