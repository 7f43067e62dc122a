"""Whether what people do, chunks on a warm cache, batches and padding, equals one plain forward: measured, not assumed.

The same documents and questions go through the model twice: as a run has them, and plainly. Plainly, a prompt is one
forward where there is no memory; with one, which a question does not write, a window, a shared context and a question
are a forward each. Alone, unpadded and without chunks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter.record import is_patched, memory_disabled
from .answering import DEFAULTS, Prepared, Settings, first_logits, whole_prompts
from .data import Document, Task
from .policies import Policy
from .telling import difference, tell, tell_plainly

# Of a share of the largest number, by dtype: what rounding makes of two orders of the same sums.
TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Equality:
    """How far the two ways lie apart.

    Attributes:
        documents: how many were looked at.
        questions: likewise.
        states: the largest difference of any number of a layer's states, as a share of the layer's largest; 0 without a
            memory.
        logits: the largest difference of a logit of an answer's first token, as a share of the largest logit.
        tokens: questions whose answers begin with another token.
        tolerance: what ``states`` and ``logits`` may be.
    """

    documents: int
    questions: int
    states: float
    logits: float
    tokens: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether nothing lies further apart than rounding explains."""
        return self.states <= self.tolerance and self.logits <= self.tolerance


def verify(
    model: nn.Module,
    tokenizer,
    task: Task,
    documents: Sequence[Document],
    policy: Policy,
    *,
    memory: bool,
    settings: Settings = DEFAULTS,
) -> Equality:
    """Tell ``documents`` and ask their questions in both ways.

    Args:
        documents: together in a batch of ``settings.batch``, as a run has them. Others as in ``answer_documents``.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    plainly = dataclasses.replace(settings, chunk=0, batch=1)
    states = logits = 0.0
    tokens = questions = 0
    with contextlib.ExitStack() as stack:
        if not memory and is_patched(model):
            stack.enter_context(memory_disabled(model))
        for first in range(0, len(documents), settings.batch):
            some = documents[first : first + settings.batch]
            run = [Prepared(model, tokenizer, task, one, policy, settings, memory) for one in some]
            told = (
                tell(model, [one.told for one in run], chunk=settings.chunk, batch=settings.batch) if memory else None
            )
            for row, document in enumerate(some):
                alone = Prepared(model, tokenizer, task, document, policy, plainly, memory)
                batched, plain = None, None
                if told is not None:
                    batched, plain = told.memory.select([row]), tell_plainly(model, alone.told)
                    states = max(states, difference(batched, plain))
                as_run = list(first_logits(run[row], batched))  # to its end, before positions may be extended again
                plainly_read = first_logits(alone, plain) if memory else whole_prompts(alone)
                for here, there in zip(as_run, list(plainly_read), strict=True):
                    questions += 1
                    logits = max(logits, _apart(here, there))
                    tokens += int(here.argmax() != there.argmax())
                if batched is not None:  # a shared context is written as it is read
                    states = max(states, difference(batched, plain))
    return Equality(len(documents), questions, states, logits, tokens, TOLERANCE.get(dtype, TOLERANCE["bfloat16"]))


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two rows of logits, as a share of the largest; infinity where one is not finite."""
    if not (first.isfinite().all() and second.isfinite().all()):
        return math.inf
    return ((first - second).abs().max() / first.abs().max().clamp(min=1e-9)).item()
