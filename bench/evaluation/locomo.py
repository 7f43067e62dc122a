"""LoCoMo on SmolLM2-135M-Instruct: whole conversations, some questions of each, all policies that fit.

The data may not be shipped: locomo10.json of github.com/snap-research/locomo (CC BY-NC 4.0).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltamem_fast.eval.answering import Settings
from deltamem_fast.eval.opening import shipped_adapters
from deltamem_fast.eval.plan import Plan

from ..instrument import results
from .plans import policies, run_all

DIRECTORY = results.DIRECTORY / "eval" / "locomo-smollm2"
MODEL = "smollm2"
QUESTIONS = 16  # of each of ten conversations
WINDOW = 1024  # tokens of a context that is told: adapters are trained on up to 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.evaluation locomo``."""
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="locomo10.json")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of each conversation (%(default)s)")
    parser.add_argument("--embedder", help="of dense retrieval, a directory such as `embedder` writes (no such row)")
    parser.add_argument("--documents", type=int, help="the first N conversations (all)")


def run(options: argparse.Namespace) -> int:
    """Measure; the rows without a memory first."""
    adapters = shipped_adapters(MODEL)
    common = {
        "model": MODEL,
        "output": options.output,
        "tasks": (("locomo", options.data),),
        "dtype": "float32",
        "documents": options.documents,
        "questions": options.questions,
        "settings": Settings(window=WINDOW),
        "verify": 1,
    }
    return run_all(
        [
            Plan(policies=policies("nothing", "last-1024", "last-4096", "bm25-4", "everything"), **common),
            Plan(policies=policies("nothing"), adapters=adapters, frozen=False, **common),
            Plan(policies=policies("bm25-4", "last-1024"), adapters={"msw": adapters["msw"]}, frozen=False, **common),
            *([] if options.embedder is None else [dense(common, options.embedder)]),
            Plan(policies=policies("yarn"), **common),  # last: minutes a conversation
        ]
    )


def dense(common: dict[str, Any], embedder: str) -> Plan:
    """Dense retrieval, without a memory."""
    settings = replace(common["settings"], embedder=embedder)
    return Plan(policies=policies("dense-4"), **common | {"settings": settings})
