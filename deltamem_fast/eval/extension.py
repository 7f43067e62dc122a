"""Context extension by YaRN (arXiv 2309.00071): a model reads further than it was trained to, without training."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

from torch import nn

from ..adapter.wrappers import decoder_of, unwrap
from ..errors import StateError, UnsupportedError

_TRAINED = "_deltamem_trained_length"  # of a rotary embedding that is extended


def trained_length(model: nn.Module) -> int:
    """How many tokens a model was trained to see: ``max_position_embeddings``, inside ``extended`` that of before.

    Raises:
        ValueError: the configuration does not say.
    """
    rotary = getattr(decoder_of(unwrap(model)), "rotary_emb", None)
    length = getattr(rotary, _TRAINED, getattr(_text_config(model), "max_position_embeddings", None))
    if not isinstance(length, int) or length < 1:
        raise UnsupportedError(f"model: the configuration of {type(model).__name__} has no max_position_embeddings")
    return length


@contextlib.contextmanager
def extended(model: nn.Module, tokens: int) -> Iterator[float]:
    """Inside, the model's positions reach to ``tokens`` by YaRN; afterwards its own rotary embedding is back.

    Yields:
        The factor, a whole number, so that a few tokens more do not change every position: how many times the trained
        length holds ``tokens``; 1 = it reaches so far by itself, nothing changes.

    Raises:
        ValueError: a model without one rotary embedding for all layers, or whose positions are scaled already.
    """
    length = trained_length(model)
    if tokens <= length:
        yield 1.0
        return
    decoder, config = decoder_of(unwrap(model)), _text_config(model)
    rotary = getattr(decoder, "rotary_emb", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if rotary is None or "rope_theta" not in parameters:
        raise UnsupportedError(
            f"policy yarn: got a {type(unwrap(model)).__name__}, allowed a model with one rotary embedding"
        )
    if parameters.get("rope_type", "default") != "default":
        raise UnsupportedError(f"policy yarn: the positions are scaled already ({parameters['rope_type']})")
    if hasattr(rotary, _TRAINED):
        raise StateError("policy yarn: the model's positions are extended already, by a run inside which this one is")
    factor = float(math.ceil(tokens / length))
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {
        **parameters,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": length,
    }
    scaled.max_position_embeddings = int(factor * length)
    device = next(rotary.buffers()).device
    decoder.rotary_emb = type(rotary)(config=scaled).to(device)
    setattr(decoder.rotary_emb, _TRAINED, length)
    config.max_position_embeddings = scaled.max_position_embeddings  # generate warns beyond it
    try:
        yield factor
    finally:
        decoder.rotary_emb, config.max_position_embeddings = rotary, length


def _text_config(model: nn.Module):
    config = unwrap(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
