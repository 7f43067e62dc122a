"""TrainingOptions: everything of a training run apart from model, adapter and data."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from ..arguments import MOST, check_choice, check_integer, check_type
from ..errors import ArgumentError
from ..storage.files import as_path
from .lengths import OVER_LONG

DTYPES = ("bfloat16", "float32")
REPORTERS = ("tensorboard", "wandb")

# A run may go on with other values of these; with another value of any other it would be another run.
CHANGEABLE = frozenset(
    "output batch_size accumulate gradient_checkpointing reentrant save_every keep workers report_to resume cpu "
    "evaluate_every progress".split()
)


@dataclass(frozen=True)
class TrainingOptions:
    """Options of ``train``; the defaults are the released recipe.

    Attributes:
        output: directory of the run: the adapter, checkpoints, ``log.jsonl``, ``curves.png``.
        steps: optimizer steps, or None = as many as ``epochs`` take.
        epochs: passes over the data, where ``steps`` is None.
        batch_size: episodes a device and forward.
        accumulate: forwards a step.
        lr: peak of the learning rate; it rises over ``warmup`` (a share of all steps) and falls as a cosine to 0.
        weight_decay, max_grad_norm: of AdamW; the norm that gradients are clipped to, 0 = not clipped.
        write_length, read_length: the most tokens of a write context, and of a read part with its answer.
        over_long: ``error`` or ``skip``; nothing is ever cut.
        visible_turns: how many user turns of a ``messages`` line the read part shows.
        state_only_probability: of showing the last user turn alone.
        no_memory_probability: of reading an empty memory; such an episode has no gradient (``build_episode``).
        gate_weight, gate_target: w and target of the write-sparsity term.
        gradient_checkpointing, reentrant: recompute layers in the backward pass, by either of torch's ways.
        seed: of fresh parameters, order and kinds.
        save_every: steps between checkpoints, 0 = only at the end or when interrupted.
        keep: how many checkpoints are kept.
        evaluate_every: steps between evaluations of the held-out files, 0 = only at the end.
        workers: processes that tokenise ahead; 0 = none.
        report_to: of ``tensorboard`` and ``wandb``, which to report to besides ``log.jsonl``.
        resume: ``""`` = a fresh run, ``auto`` = from the newest whole checkpoint in ``output`` (from the start if
            there is none), or a checkpoint's directory.
        cpu: leave GPUs alone.
        progress: show a progress bar.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """

    output: str
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 1
    accumulate: int = 4
    lr: float = 2e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    write_length: int = 8192
    read_length: int = 512
    over_long: str = "error"
    visible_turns: int = 1
    state_only_probability: float = 0.2
    no_memory_probability: float = 0.0
    gate_weight: float = 0.01
    gate_target: float = 0.05
    gradient_checkpointing: bool = False
    reentrant: bool = False
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    evaluate_every: int = 0
    workers: int = 0
    report_to: tuple[str, ...] = ()
    resume: str = ""
    cpu: bool = False
    progress: bool = True

    def __post_init__(self):
        object.__setattr__(self, "output", str(as_path(self.output, "output")))
        check_type(self.report_to, "report_to", list | tuple, "a tuple of names")
        object.__setattr__(self, "report_to", tuple(self.report_to))
        for name in ("batch_size", "accumulate", "write_length", "read_length", "visible_turns", "keep"):
            check_integer(getattr(self, name), name, 1)
        for name in ("seed", "save_every", "evaluate_every", "workers"):
            check_integer(getattr(self, name), name, 0)
        check_integer(self.steps, "steps", 1, or_none=True)
        for name in ("epochs", "lr"):
            _number(name, getattr(self, name), "more than 0", lambda value: value > 0)
        for name in ("weight_decay", "max_grad_norm", "gate_weight"):
            _number(name, getattr(self, name), "0 or more", lambda value: value >= 0)
        for name in ("warmup", "state_only_probability", "no_memory_probability", "gate_target"):
            _number(name, getattr(self, name), "0 to 1", lambda value: 0 <= value <= 1)
        if (self.steps or 1) * self.batch_size * self.accumulate > MOST:
            raise ArgumentError(f"steps: with batch_size and accumulate they make more than {MOST:,} episodes")
        both = self.state_only_probability + self.no_memory_probability
        if both > 1:
            raise ArgumentError(
                f"no_memory_probability: with state_only_probability it makes {both}, allowed 1 at most"
            )
        check_choice(self.over_long, "over_long", OVER_LONG)
        for name in self.report_to:
            check_choice(name, "report_to", REPORTERS)
        if self.reentrant and not self.gradient_checkpointing:
            raise ArgumentError("reentrant: given without gradient_checkpointing, whose kind it is")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of episodes that this run may draw, but no_memory, which is never longer than both."""
        return ("both", "state_only") if self.state_only_probability else ("both",)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


def _number(name: str, value, allowed: str, condition) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not good or not condition(value):
        raise ArgumentError(f"{name}: got {value!r}, allowed a number, {allowed}")
