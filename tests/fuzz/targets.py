"""Every reader of what comes from outside, in one table: name, function, how it is called, and inputs to begin with.

The hypothesis test (``make test``) and the coverage-guided run (``atheris_run.py``) both take it from here.
"""

from __future__ import annotations

import eval_targets
import files_targets
import server_targets
import text_targets
from places import Target

from deltamem_fast.errors import DeltaMemError

TARGETS: dict[str, Target] = {
    target.name: target
    for group in (files_targets, eval_targets, text_targets, server_targets)
    for target in group.TARGETS
}
LONGEST = 2500  # characters of an error


def attempt(target: Target, data: bytes) -> DeltaMemError | None:
    """Read one input; the error of ours that it ended in, or None.

    Raises:
        AssertionError: an error that is too long, has no text, or hides that memory ran out.
        Exception: whatever else the target raises: a fault.
    """
    try:
        target.run(data)
    except DeltaMemError as error:
        text, cause = str(error), error
        assert 0 < len(text) <= LONGEST, f"an error of {len(text)} characters: {text[:200]}"
        while cause is not None:
            assert not isinstance(cause, MemoryError), f"memory ran out: {text[:200]}"
            cause = cause.__cause__ or cause.__context__
        return error
    return None
