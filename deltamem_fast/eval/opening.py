"""The model of an evaluation, bare or with a memory, from its arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from deltamem_kernels.dispatch import resolve_backend

from ..adapter.files import AdapterSource, read_adapter
from ..adapter.shipped import SHIPPED
from ..arguments import check_choice
from ..config import DeltaMemConfig
from ..errors import ArgumentError
from ..model.known import is_known
from ..model.loading import device_for, found_model, load_model, usable_device
from ..model.patch import patch_model
from ..recall.weights import find_weights

# Write strategy → what an adapter's configuration has for it; "ssw" leaves an adapter that writes segments as it is.
STRATEGIES = {"tsw": "token", "ssw": "message_mean", "ssw-sentence": "sentence_mean", "msw": "token"}
SMALL = "recall"  # the small backbone of the recall proof, as an evaluation's MODEL


def small_backbone() -> tuple[str, dict[str, str], dict[str, str]]:
    """The shipped small backbone's directory; label → adapter's directory; and what records call each, by its path."""
    weights = find_weights()
    model, adapters = str(weights.backbone), {label: str(path) for label, path in weights.adapters.items()}
    return model, adapters, {model: SMALL, **{path: f"{SMALL}/{label}" for label, path in adapters.items()}}


def shipped_adapters(model: str) -> dict[str, str]:
    """Label → name of the adapters that are shipped for a model of ``KNOWN``; {} of another."""
    return {name.partition("/")[2]: name for name in SHIPPED if name.startswith(f"{model}/")} if is_known(model) else {}


def open_model(
    pretrained: str,
    adapter: str | None = None,
    *,
    strategy: str | None = None,
    backend: str = "auto",
    device: Any = None,
    dtype: str = "auto",
    attention: str | None = None,
) -> tuple[nn.Module, Any]:
    """A frozen model and its tokenizer; with a memory, if there is an adapter.

    Args:
        pretrained: a directory, a hub id, or a name of ``KNOWN``.
        adapter: a directory, a hub id, or the name of a shipped one; None = no memory, unless ``strategy`` names one
            of the shipped adapters of a model of ``KNOWN``.
        strategy: one of ``STRATEGIES``: how the adapter writes, whatever it was trained for; None = as trained.
        backend: of the memory, see ``patch_model``.
        device: as torch names it; None = a GPU if there is one.
        dtype, attention: see ``load_model``.

    Raises:
        ValueError, OSError, ImportError: naming the argument, before the weights are read.
    """
    if strategy is not None:
        check_choice(strategy, "strategy", STRATEGIES)
    device = device_for(backend) if device is None else usable_device(device)
    resolve_backend(backend, device.type)
    found_model(pretrained, "pretrained")
    source = None
    if adapter is None and strategy is not None:
        adapter = f"{pretrained}/{strategy}"
        if not is_known(pretrained) or adapter not in SHIPPED:
            raise ArgumentError(
                f"strategy: got {strategy!r} without adapter, allowed with one, or with pretrained= and strategy= that "
                f"name a shipped one: {', '.join(SHIPPED)}"
            )
    if adapter is not None:
        source = read_adapter(adapter)
        if strategy is not None:
            source = with_strategy(source, strategy)
    model, tokenizer = load_model(pretrained, "pretrained", device=device, dtype=dtype, attention=attention, quiet=True)
    return (model if source is None else patch_model(model, source, backend=backend)), tokenizer


def with_strategy(source: AdapterSource, strategy: str) -> AdapterSource:
    """An adapter that writes by another strategy than it was trained for; its weights are the same.

    Raises:
        ValueError: one memory head from several, or several from one: those are other weights.
    """
    check_choice(strategy, "strategy", STRATEGIES)
    config = source.config
    heads = config.num_state_heads
    if (strategy == "msw") != (heads > 1):
        raise ArgumentError(
            f"strategy: got {strategy!r}, but {source.name} has {heads} memory head(s): MSW has several, with weights "
            f"of their own, TSW and SSW one; allowed {'msw' if heads > 1 else 'tsw, ssw, ssw-sentence'}"
        )
    granularity = config.memory_write_granularity if strategy == "ssw" and config.segmented else STRATEGIES[strategy]
    changed = dataclasses.replace(config, memory_write_granularity=granularity)
    return dataclasses.replace(source, config=changed)


def strategy_of(config: DeltaMemConfig) -> str:
    """The name in ``STRATEGIES`` of how an adapter writes."""
    if config.segmented:
        return "ssw" if config.memory_write_granularity == "message_mean" else "ssw-sentence"
    return "msw" if config.num_state_heads > 1 else "tsw"
