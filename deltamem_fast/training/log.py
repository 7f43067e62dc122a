"""The record of a training run, one JSON object a line, appended as it goes; and its curves as a picture."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import ArgumentError, FileFormatError
from ..storage.files import as_path, naming_files, read_bytes, write_atomically, write_text

LOG_NAME = "log.jsonl"
CURVES_NAME = "curves.png"


class TrainingLog:
    """Appends entries to a JSONL file; each is on the disk when ``write`` returns.

    A training entry has ``step``, ``loss``, ``answer_loss``, ``penalty``, ``learning_rate``, ``grad_norm``,
    ``mean_beta`` and ``saturated`` (a list with a number a layer), ``tokens``, ``tokens_per_second`` and ``epoch``,
    and ``state_only_loss`` or ``no_memory_loss`` where such episodes were among the step's. An evaluation's entry has
    ``step`` and ``evaluation``: by file, ``loss`` and ``no_memory_loss``.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path, "log")

    def start(self, step: int) -> None:
        """Begin a log, or go on with one after ``step``: what was written later, and a torn last line, go."""
        known = read_log(self.path) if step and self.path.is_file() else []
        write_text(self.path, "".join(_line(entry) for entry in known if entry["step"] <= step), private=False)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry."""
        with naming_files("log", self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(_plain(entry), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value):
    """NaN and infinities are no JSON: they are written as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of a log; a last line that was torn by a crash is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: another line is no entry; by file and line.
    """
    entries = []
    path = as_path(path, "log")
    # Not splitlines: a file's name in an entry may hold U+2028 and the like.
    *lines, torn = read_bytes(path, "log").decode("utf-8", "replace").split("\n")
    for number, line in enumerate([*lines, torn] if torn else lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or type(entry.get("step")) is not int:
                raise FileFormatError("got something else than an object with a step")
        except (ValueError, RecursionError) as error:
            if number > len(lines):
                break
            raise FileFormatError(f"{path}:{number}: not an entry of a training log: {error}") from error
        entries.append(entry)
    return entries


# --- curves


def draw_curves(log: str | os.PathLike, target: str | os.PathLike) -> Path:
    """Draw loss, gates, gradient norm and learning rate over the steps of a log into a PNG.

    Raises:
        ImportError: matplotlib is not installed (the extra ``train`` has it).
        ValueError: the log is broken, or has no step.
    """
    from matplotlib.figure import Figure

    entries = read_log(log)
    training = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "evaluation" in entry]
    if not training:
        raise ArgumentError(f"log: {log} holds no training step")
    figure, picture = Figure(figsize=(11, 7), layout="constrained"), io.BytesIO()
    (loss, gates), (norm, rate) = figure.subplots(2, 2)
    try:
        _draw_loss(loss, training, evaluations)
        _draw_gates(gates, training)
        _draw(norm, training, "grad_norm", "gradient norm")
        _draw(rate, training, "learning_rate", "learning rate")
        for axes in (loss, gates, norm, rate):
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        figure.savefig(picture, format="png", dpi=110)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        # An entry without what is drawn, or with another kind of it.
        raise FileFormatError(f"log: {log}: its entries are not those of a run: {shown(error)}") from error
    return write_atomically(target, lambda temporary: temporary.write_bytes(picture.getbuffer()), private=False)


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
        found = [{"step": e["step"], **e["evaluation"][file]} for e in evaluations if file in e["evaluation"]]
        axes.plot(*_series(found, "loss"), "o-", label=f"{Path(file).name}")
        axes.plot(*_series(found, "no_memory_loss"), "x--", label=f"{Path(file).name}, no memory")
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
