"""Tokens that come in as NaN or Inf: kept from the others, which attention's 0 · NaN would carry them to.

Such a token goes through the layers as zeros and the memory leaves it out, as a masked one. Its own place in the last
hidden states is NaN in the end, as the bare model's is; in the bare model all later tokens are NaN, too (and, where the
mask is multiplied, those before it).

What turns to NaN inside the layers is not seen here, because nobody could look at every layer for nothing: a sum that
overflows in float16, a state of which a read overflows (float32's, from about 3e38 / r on), or whose read times
``delta_{q,k,v,o}_proj`` is more than the model's dtype holds (65,504 in float16). That token is NaN from there on, and
through keys and values the later ones of its row are, as in the bare model. Every layer's memory leaves them out and
counts them (``skipped``); states stay finite, and other rows what they were.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import nn

from ..notices import logger
from .call import MemoryCall, with_hidden

# By embedding: address and version of its weight, and which of its rows are not finite; None: all are.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], torch.Tensor | None]] = weakref.WeakKeyDictionary()


def contain(decoder: nn.Module, call: MemoryCall, arguments: dict[str, Any]) -> torch.Tensor | None:
    """Before the layers of a forward: take tokens that are not finite out of it.

    Args:
        decoder: the patched decoder.
        call: this forward's memory; such tokens are masked in it.
        arguments: the decoder's own, by name; may get other ``inputs_embeds``, and those for ``input_ids``.

    Returns:
        bool [B, T], which tokens are finite; None where all are.
    """
    hidden = arguments.get("inputs_embeds")
    if hidden is None:
        hidden = _broken_embeddings(decoder, arguments.get("input_ids"))
        if hidden is None:
            return None
    asks = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    if asks and math.isfinite(hidden.detach().sum().item()):
        return None
    finite = torch.isfinite(hidden.detach()).all(-1)
    if asks and finite.all():
        return None  # their sum alone overflows
    arguments["inputs_embeds"] = torch.where(finite.unsqueeze(-1), hidden, 0.0)
    arguments["input_ids"] = None
    call.leave_out(finite)
    if asks:
        row, token = (~finite).nonzero()[0].tolist()
        logger.warning(
            "inputs: %d token(s) are NaN or Inf, the first in row %d at place %d; the memory leaves them out, and the "
            "others attend to zeros in their place", int((~finite).sum()), row, token,
        )  # fmt: skip
    return finite


def give_back(call: MemoryCall, output, finite: torch.Tensor):
    """After the layers: count what ``contain`` has taken out, and make it NaN again in the last hidden state."""
    call.count_left_out(finite)
    return with_hidden(output, torch.where(finite.unsqueeze(-1), output[0], torch.nan))


def _broken_embeddings(decoder: nn.Module, input_ids: torch.Tensor | None) -> torch.Tensor | None:
    """The embeddings of tokens one of which has a row in the table that is not finite; None if none has.

    Compiled code cannot look at the table. If it had such a row at the last look, by ``patch_model`` or a forward that
    was not compiled, every token is looked at.
    """
    if input_ids is None:
        return None
    if torch.compiler.is_compiling():
        return _embedding(decoder)(input_ids) if decoder._delta_memory_patch.broken_embeddings else None
    rows = broken_rows(decoder)
    decoder._delta_memory_patch.broken_embeddings = rows is not None
    if rows is None or not rows[input_ids].any():
        return None
    return _embedding(decoder)(input_ids)


def broken_rows(decoder: nn.Module) -> torch.Tensor | None:
    """Which rows of a decoder's table of embeddings are not finite, bool [vocabulary]; None if all are.

    The table is looked through once, and again when it has changed.
    """
    embedding = _embedding(decoder)
    weight = None if embedding is None else embedding._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_inference() or weight.is_meta:
        return None
    version = weight.data_ptr(), weight._version
    known, rows = _known.get(embedding, (None, None))
    if known != version:
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        rows = None
        with torch.no_grad():
            # In parts: the sum of a whole table in another dtype makes a copy of it.
            sums = [part.sum(dtype=torch.float32) for part in weight.split(8192)]
            if not math.isfinite(torch.stack(sums).sum().item()):
                rows = ~torch.isfinite(weight).all(-1)
                rows = rows if rows.any() else None
        _known[embedding] = version, rows
    return rows


def _embedding(decoder: nn.Module) -> nn.Module | None:
    try:
        return decoder._modules.get("embed_tokens") or decoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # it takes embeddings alone
        return None
