"""The smallest inputs that reach all lines that any of many reaches, into ``tests/fuzz/corpus``.

    python -m tests.fuzz.keep --corpus DIR

DIR is what ``atheris_run --corpus DIR`` has found, a folder a target. What is kept already is looked at, too.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = HERE / "corpus"
MOST_BYTES = 6_000  # of a target's inputs together; one is always kept
_PACKAGE = str(HERE.parents[1] / "deltamem_fast")


def main(arguments: list[str] | None = None) -> int:
    """Choose for each target."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.keep", description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--target", nargs="+")
    given = parser.parse_args(arguments)
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import torch
    from targets import TARGETS, attempt

    torch.set_num_threads(1)
    for name in given.target or TARGETS:
        target = TARGETS[name]
        folders = (KEPT / name, given.corpus / name)
        found = {path.read_bytes() for folder in folders if folder.is_dir() for path in folder.iterdir()}
        for data in (found := found | set(target.seeds())):  # what is made once is made now
            attempt(target, data)
        chosen = _chosen(sorted(found, key=lambda data: (len(data), data)), functools.partial(attempt, target))
        shutil.rmtree(KEPT / name, ignore_errors=True)
        (KEPT / name).mkdir(parents=True)
        for data in chosen:
            (KEPT / name / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
        print(f"{name:20} {len(chosen):4} of {len(found):5}, {sum(map(len, chosen)):7,} bytes", flush=True)
    return 0


def _chosen(inputs: list[bytes], call: Callable[[bytes], Any]) -> list[bytes]:
    """Of inputs, the shortest first, those that go from a line to a line as none before them did."""
    known: set[tuple] = set()
    chosen: list[bytes] = []
    for data in inputs:
        reached = _reached(call, data)
        fits = not chosen or sum(map(len, chosen)) + len(data) <= MOST_BYTES
        if fits and not reached <= known:
            known |= reached
            chosen.append(data)
    return chosen


def _reached(call: Callable[[bytes], Any], data: bytes) -> set[tuple]:
    """The steps from line to line within the package."""
    reached: set[tuple] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        code, before = frame.f_code, 0

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            if event == "line":
                reached.add((code, before, frame.f_lineno))
                before = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        call(data)
    finally:
        sys.settrace(None)
    return reached


if __name__ == "__main__":
    sys.exit(main())
