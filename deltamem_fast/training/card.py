"""The README.md beside a trained adapter."""

from __future__ import annotations

from ..adapter.card import card_of, table_of
from ..config import DeltaMemConfig
from ..version import __version__
from .checkpoints import Run
from .lengths import Checked

CARD_NAME = "README.md"
# Of the machine, not of the adapter.
_LEFT_OUT = frozenset("output resume keep workers report_to cpu progress save_every evaluate_every".split())


def model_card(
    run: Run, base_model: str | None, checked: Checked, steps: int, evaluation: dict[str, dict[str, float]]
) -> str:
    """What an adapter is and how it was trained, as Markdown.

    Args:
        base_model: the backbone's hub id, or None: it has none.
    """
    default = DeltaMemConfig().to_dict()
    config = {name: value for name, value in run.adapter.items() if name in _SHOWN or value != default[name]}
    options = {name: value for name, value in run.options.items() if name not in _LEFT_OUT}
    about = (
        f"An online memory for {run.model}, trained for {steps:,} steps of {run.episodes_a_step} episodes with "
        f"deltamem-fast {__version__}."
    )
    lines = [
        *card_of(base_model, about, "this directory"),
        f"Data: {checked} (SHA-256 of the files {run.data[:16]}…).",
        "",
        *table_of("adapter", config),
        "",
        *table_of("training", options),
    ]
    if evaluation:
        lines += ["", "| held-out file | loss of the answers | without memory |", "| --- | --- | --- |"]
        for name, found in evaluation.items():
            lines.append(f"| {name} | {found['loss']:.4f} | {found['no_memory_loss']:.4f} |")
    return "\n".join(lines) + "\n"


_SHOWN = ("rank", "alpha", "num_state_heads", "memory_write_granularity", "delta_heads", "output_init")
