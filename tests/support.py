"""Helpers of the tests: golden cases, small models, comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ in float64; NaN never passes a comparison."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def golden_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """case.json and the tensors of a golden case."""
    return json.loads((GOLDEN / name / "case.json").read_text()), load_file(GOLDEN / name / "golden.safetensors")


def golden_model(case: dict, attention: str = "eager"):
    """The backbone of a golden case."""
    directory = GOLDEN / case["model"].removeprefix("../")
    dtype = getattr(torch, case.get("dtype", "float32"))
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention, dtype=dtype).eval()
