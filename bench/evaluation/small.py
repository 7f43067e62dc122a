"""The generated changes on the small backbone: policies × strategies, quality against cost."""

from __future__ import annotations

import argparse

from deltamem_fast.eval.answering import Settings
from deltamem_fast.eval.opening import small_backbone
from deltamem_fast.eval.plan import Plan

from ..instrument import results
from .plans import policies, run_all

DIRECTORY = results.DIRECTORY / "eval" / "changes-small"
NAMES = ("nothing", "last-32", "last-64", "bm25-1", "bm25-2", "bm25-4", "everything")
CHUNK = 16  # tokens of what retrieval finds: a sentence or two of this world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.evaluation small``."""
    parser.add_argument("--documents", type=int, help="the first N texts (all)")


def run(options: argparse.Namespace) -> int:
    """Measure."""
    model, adapters, shown = small_backbone()
    plan = Plan(
        model,
        options.output,
        (("changes-small", None),),
        policies(*NAMES),
        adapters,
        documents=options.documents,
        verify=8,
        settings=Settings(chunk_tokens=CHUNK),
        shown=shown,
    )
    return run_all([plan])
