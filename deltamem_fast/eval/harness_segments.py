"""Which of their tokens are averaged into one write, where segments are written."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..text.messages import Message
from ..text.segments import segment_ids_under, sentence_spans, tokenize

NOT_WRITTEN = -1


def prompt_segments(
    tokenizer,
    ids: Sequence[int],
    text: str,
    granularity: str,
    messages: Sequence[Message] | None = None,
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """The segment of each token of a prompt, as in training and serving; −1 = not written.

    Args:
        tokenizer: a fast one.
        ids: of the prompt, as it is fed: of ``text``, or of it without the white space at its end, which lm_eval puts
            before a continuation that it scores. Special tokens may stand before it, or it may be cut off on the left.
        text: the prompt, from which ``ids`` were made.
        granularity: ``message_mean`` or ``sentence_mean``.
        messages: whose rendering ``text`` is, with the header of an answer at its end, and perhaps the beginning of an
            answer behind it; None = plain text, one segment or a segment a sentence.
        template: arguments of the chat template.

    Raises:
        ValueError: no fast tokenizer, or the template hides where a message begins and ends.
    """
    if messages is not None:
        _, rows = segment_ids_under(tokenizer, messages, granularity, template or {}, add_generation_prompt=True)
        owners = rows[0].tolist()
    else:
        starts = tokenize(tokenizer, text)[1]
        firsts = [start for start, _ in sentence_spans(text)] if granularity == "sentence_mean" else [0]
        owners = [bisect_right(firsts, start) - 1 for start in starts]
    ids = list(ids)
    for fed in dict.fromkeys((text, text.rstrip())):
        found = _placed(ids, tokenize(tokenizer, fed)[0], owners)
        if found is not None:
            return found
    return [0] * len(ids)  # other tokens than those of the text alone: the prompt is one segment, as generate has it


def _placed(ids: list[int], fed: list[int], owners: Sequence[int]) -> list[int] | None:
    """The segments of ``ids``; None: neither are they the last of ``fed``, nor do these stand at their end.

    Args:
        fed: of the prompt, whole; they begin as the tokens do that ``owners`` are of, and may differ at the end, where
            white space was cut off, or the beginning of an answer, which is not written, stands behind.
    """
    whole = [*owners[: len(fed)], *[NOT_WRITTEN] * (len(fed) - len(owners))]
    more = len(ids) - len(fed)
    if more <= 0 and fed[-more:] == ids:
        return whole[-more:]
    if more > 0 and ids[more:] == fed:  # a token for the beginning of the text stands before it
        return [NOT_WRITTEN] * more + whole
    return None


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions from a 2-D mask, as ``generate`` has them: the first real token of a row is 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
