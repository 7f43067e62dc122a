"""The log-likelihood of whole texts, however long, by a model with a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter.wrappers import input_device
from ..memory.state import MemoryState
from ..text.encode import attention_mask, padded
from .harness_segments import NOT_WRITTEN


@torch.no_grad()
def rolled(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    length: int,
    *,
    rows: int,
    segmented: bool,
    dtype: torch.dtype | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> list[float]:
    """Of each text the sum over its tokens but the first, each given those before it.

    A text is cut into windows of ``length`` tokens, each a context of its own; what stands before a window is known
    from the memory alone. The windows are disjoint: every token is read, written and scored once. (lm_eval's ``hf`` has
    the last window reach back; of a memory that would write those tokens twice.) A text of one token or none has 0.

    Args:
        model: patched.
        texts: token ids.
        rows: texts that are read together.
        segmented: whether the adapter writes segments; a window is one then.
        dtype: in which probabilities are taken; None = the logits'.
        done: told how many texts were finished.
    """
    windows = [
        [text[first : first + length + 1] for first in range(0, len(text) - 1, length)]  # one more, to be scored
        for text in texts
    ]
    totals = [0.0] * len(texts)
    order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
    for first in range(0, len(order), rows):
        places = order[first : first + rows]
        memory = MemoryState.zeros(model, len(places))
        for step in range(len(windows[places[0]])):
            active = [place for place in places if step < len(windows[place])]  # the longest stand first
            memory = memory.select(range(len(active)))
            scores = _read(model, [windows[place][step] for place in active], memory, segmented, dtype)
            for place, score in zip(active, scores):
                totals[place] += score
        done(len(places))
    return totals


def _read(
    model: nn.Module, windows: Sequence[Sequence[int]], memory: MemoryState, segmented: bool, dtype: torch.dtype | None
) -> list[float]:
    """The scores of a window of each text; ``memory`` is written further."""
    device, fed = input_device(model), [window[:-1] for window in windows]
    arguments = {"attention_mask": attention_mask(fed).to(device), "memory": memory, "use_cache": False}
    if segmented:
        arguments["segment_ids"] = padded([[0] * len(ids) for ids in fed], NOT_WRITTEN).to(device)
    logits = model(padded(fed, 0).to(device), **arguments).logits
    scores = F.log_softmax(logits, dim=-1, dtype=dtype)
    found = []
    for row, window in zip(scores, windows):
        wanted = torch.tensor(window[1:], device=row.device)[:, None]
        found.append(float(row[: len(wanted)].gather(1, wanted).sum()))
    return found
