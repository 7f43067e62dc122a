"""Curves of a training run, from its log, as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..storage.files import write_atomically
from .log import read_log

CURVES_NAME = "curves.png"


def draw_curves(log: str | os.PathLike, target: str | os.PathLike) -> Path:
    """Draw loss, gates, gradient norm and learning rate over the steps of a log into a PNG.

    Raises:
        ImportError: matplotlib is not installed (the extra ``train`` has it).
        ValueError: the log is broken, or has no step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = read_log(log)
    training = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "evaluation" in entry]
    if not training:
        raise ArgumentError(f"log: {log} holds no training step")
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, gates), (norm, rate) = figure.subplots(2, 2)
    _draw_loss(loss, training, evaluations)
    _draw_gates(gates, training)
    _draw(norm, training, "grad_norm", "gradient norm")
    _draw(rate, training, "learning_rate", "learning rate")
    for axes in (loss, gates, norm, rate):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    return write_atomically(target, lambda temporary: figure.savefig(temporary, format="png", dpi=110), private=False)


def _number(value) -> float:
    # The log writes NaN and infinities as text.
    return float("nan") if value is None else float(value)


def _series(entries: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [entry["step"] for entry in entries], [_number(entry.get(name)) for entry in entries]


def _draw(axes, entries, name: str, title: str) -> None:
    axes.plot(*_series(entries, name), linewidth=1)
    axes.set_title(title)


def _draw_loss(axes, training, evaluations) -> None:
    steps, values = _series(training, "answer_loss")
    axes.plot(steps, values, linewidth=0.8, alpha=0.4, label="answer loss")
    axes.plot(steps, smoothed(values), linewidth=1.6, label="smoothed")
    for file in dict.fromkeys(name for entry in evaluations for name in entry["evaluation"]):
        with_file = [entry for entry in evaluations if file in entry["evaluation"]]
        at = [entry["step"] for entry in with_file]
        axes.plot(at, [_number(e["evaluation"][file]["loss"]) for e in with_file], "o-", label=f"{Path(file).name}")
        without = [_number(e["evaluation"][file]["no_memory_loss"]) for e in with_file]
        axes.plot(at, without, "x--", label=f"{Path(file).name}, no memory")
    axes.set_title("cross-entropy of the answers")
    axes.legend()


def _draw_gates(axes, training) -> None:
    layers = len(training[-1]["mean_beta"])
    for layer in range(layers):
        values = [_number(entry["mean_beta"][layer]) for entry in training]
        shade = 0.15 + 0.7 * layer / max(1, layers - 1)
        axes.plot([e["step"] for e in training], values, linewidth=1, color=(0.1, shade, 0.9 - 0.6 * shade))
    axes.set_title(f"mean β of {layers} layers (first blue, last green)")


def smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    """An exponential moving average without the bias of its start; what is not finite is passed over."""
    total = weight = 0.0
    means = []
    for value in values:
        if value - value == 0:
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight if weight else float("nan"))
    return means
