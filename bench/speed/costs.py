"""What needs no clock: operations and launches per decoded token, what the compiler makes of the kernels, depth."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from unittest import mock

import torch

from deltamem_fast import DeltaMemConfig, patch_model
from deltamem_kernels.dispatch import installed
from deltamem_kernels.rule import DeltaRule

from ..instrument import backbones, launches
from ..instrument.rows import Row, absent, counted, refused
from . import peers

CASES = 3  # the released sizes, short and long, and several heads in packed rows
DEPTHS = (128, 2048, 8192, 32768, 131_072)


def _variant(name: str, layers: int, dtype: torch.dtype):
    torch.manual_seed(0)
    backbone = backbones.build(backbones.configuration("Qwen3-4B", True, num_hidden_layers=layers), dtype, "cpu")
    if name == "unpatched":
        return backbone
    if name == "released":
        return peers.released_model(
            backbone, patch_model(copy.deepcopy(backbone), DeltaMemConfig(), backend="reference")
        )
    return patch_model(backbone, DeltaMemConfig(), backend=name)


def _operation_row(name: str, dtype: torch.dtype) -> Row:
    """One variant: ``unpatched``, ``released`` or the backend of a patched model."""
    title = name if name in ("unpatched", "released") else "patched"
    parameters = {"model": "Qwen3", "batch": 1, "dtype": str(dtype).removeprefix("torch.")}
    parameters |= {"backend": name} if title == "patched" else {}
    if name == "released" and peers.released() is None:
        return absent("operations/released", peers.MISSING["released"], parameters)
    if title == "patched" and name != "reference" and not installed(name):
        return absent("operations/patched", f"{name} is not installed", parameters)
    with launches.triton_without_device() if name == "triton" else nullcontext():
        try:
            count = launches.per_layer(functools.partial(_variant, name, dtype=dtype))
        except Exception as error:  # a path that cannot run must not cost the rows of the others
            note = f"failed: {type(error).__name__}: {error}"
            return refused(f"operations/{title}", parameters, note.splitlines()[0][:300])
    numbers = {"operations": count.total, "launches": count.launches.total(), "allocations": count.allocations}
    return counted(f"operations/{title}", parameters, **numbers)


def operation_rows() -> Iterator[Row]:
    """Tensor operations and launches per decoded token and layer of a Qwen3 under SDPA; see ``launches``.

    bfloat16 is what a GPU runs; what Triton launches is taken down without one. The released package's Triton scan
    needs a GPU, so its loop over the tokens is counted. float32 is what a CPU runs.
    """
    for name in ("unpatched", "triton", "reference", "released"):
        yield _operation_row(name, torch.bfloat16)
    for name in ("unpatched", "numba"):
        yield _operation_row(name, torch.float32)


def compiled_rows(quick: bool = False) -> Iterator[Row]:
    """Of all kernels compiled ahead of time, the most registers, shared memory, spills and stack, by target.

    The targets of ``deltamem_kernels.report``, in ``CASES`` of its cases: all of them take minutes
    (``make kernels-report``).

    Args:
        quick: two launches of one case, for one target.
    """
    if not installed("triton"):
        yield absent("compiled", "triton is not installed")
        return
    from deltamem_kernels import report

    cases, most = (1, 2) if quick else (CASES, None)
    for target in ["sm_90"] if quick else report.TARGETS:
        seen: set = set()
        # A cache of its own: what is reported is what this compiler makes, not what an earlier one left.
        with tempfile.TemporaryDirectory() as directory, mock.patch.dict("os.environ", TRITON_CACHE_DIR=directory):
            found = [r for case in report.CASES[:cases] for r in report.measure(target, case, seen, most)]
        yield counted(
            "compiled", {"target": target, "cases": cases}, kernels=len(found),
            registers=max(r.registers for r in found), shared=max(r.shared for r in found),
            spills=sum(r.spills for r in found), stack=sum(r.stack for r in found),
            spills_and_stack=sum(r.spills + r.stack for r in found),
        )  # fmt: skip


def depth_rows() -> Iterator[Row]:
    """Dependent token steps of a scan over T tokens."""
    for length in DEPTHS:
        parameters = {"tokens": length, "rank": 8, "heads": 1}
        try:
            from deltamem_kernels.triton.scan import depth
        except ImportError as error:
            yield absent("scan-depth", str(error).split(" (")[0], parameters)
            return
        yield counted("scan-depth", parameters, depth=int(depth(DeltaRule(8), length)))


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    """All rows; ``quick``: of the compiled kernels, two."""
    progress("operations per decoded token and layer")
    rows = list(operation_rows())
    for row in compiled_rows(quick):
        progress(f"compiled for {row.parameters.get('target')}")
        rows.append(row)
    return rows + list(depth_rows())
