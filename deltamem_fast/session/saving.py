"""A session's files: JSON for what was said and set, safetensors for memories, keys and values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..adapter.record import identity_of
from ..adapter.wrappers import decoder_of, unwrap
from ..arguments import shown
from ..errors import ArgumentError, ArgumentTypeError, FileFormatError, StateError
from ..memory.file import check_made_under, whole_counts
from ..memory.state import MemoryState
from ..model.cache import MemoryDynamicLayer, MemoryDynamicSlidingWindowLayer, replace_layers
from ..storage import snapshots
from ..storage.files import as_path, parse_json
from ..storage.tensors import FLOATS, Header, parse_tensors, save_tensors
from ..text.encode import vocabulary_size
from ..text.settings import check_generation, check_template
from .audit import audit_from
from .blocks import Block
from .schema import check_content, check_identity
from .turns import Mark, Now, Turn, new_cache

FORMAT, FORMAT_VERSION = "deltamem-session", 3
_MUST_BE_JSON = "its messages, template and generation settings must be JSON to be saved"
# Of whose cache nothing but keys, values and lengths has to be kept.
_SAVED_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, MemoryDynamicLayer, MemoryDynamicSlidingWindowLayer)


def save(
    model: nn.Module,
    now: Now,
    settings: dict[str, Any],
    directory: str | os.PathLike,
    *,
    with_cache: bool,
    known: dict[str, int],
    overwrite: bool,
) -> Path:
    """Write a session on ``model``; see ``MemorySession.save``.

    Args:
        now: the conversation between two turns.
        settings: arguments of ``MemorySession``: system, context_turns, context_tokens, template and generation; and
            ``remembers``.
        known: the snapshots that this session was loaded from or saved to; see ``snapshots.commit``.
    """
    directory = snapshots.as_target(directory)
    content, tensors = contents(model, now, settings, with_cache=with_cache)
    _check_can_be_loaded(model, content, tensors)
    write = {"state": lambda path: save_tensors(tensors, path, {"format": FORMAT})}
    return snapshots.commit(directory, FORMAT, FORMAT_VERSION, content, write, known=known, overwrite=overwrite)


def _check_can_be_loaded(model: nn.Module, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    try:
        data = json.dumps(content, allow_nan=False)
    except TypeError as error:
        raise ArgumentTypeError(f"session: {_MUST_BE_JSON}: {error}") from error
    except (ValueError, RecursionError) as error:  # NaN, integers without end, lists in one another
        raise ArgumentError(f"session: {_MUST_BE_JSON}: {error}") from error
    vocabulary, segmented = vocabulary_size(model), identity_of(model).config.segmented
    check_template(content["settings"]["template"], "session: template", ArgumentError)
    check_generation(content["settings"]["generation"], "session: generation", vocabulary, ArgumentError)
    try:
        check_content(parse_json(data, "session"), "session", vocabulary, segmented, ArgumentError)
    except FileFormatError as error:  # keys that are one and the same in JSON
        raise ArgumentError(f"session: {_MUST_BE_JSON}: {error}") from error
    for name, tensor in tensors.items():
        if name.startswith("memory.") and not tensor.isfinite().all():
            raise StateError(
                f"session: its memory of layer {name.removeprefix('memory.')} holds NaN or Inf, which is not saved; "
                "restore an earlier snapshot, or memory.zero_()"
            )


def contents(
    model: nn.Module, now: Now, settings: dict[str, Any], *, with_cache: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a snapshot holds: JSON, and tensors on the CPU."""
    now.memory.check_whole()
    if now.memory.broken:
        raise StateError(f"session: its memory cannot be saved: {now.memory.broken}")
    memories = [*(turn.before for turn in now.turns), now.memory]
    tensors = {f"memory.{i}": torch.cat([memory[i].detach().cpu() for memory in memories]) for i in now.memory}
    counts = [torch.cat([memory.counter(i).cpu() for memory in memories]) for i in now.memory]
    tensors["skipped"] = whole_counts(torch.stack(counts))
    cache = now.window() if with_cache else None
    if cache is not None and any(type(layer) not in _SAVED_LAYERS for layer in cache.layers):
        cache = None  # it is computed again
    content = {
        "identity": identity_of(model).fingerprints(),
        "settings": settings,
        "messages": [dict(message) for message in now.messages],
        "context": {
            "preamble": _block_to_json(now.preamble),
            "written": now.written,
            "turns": [_turn_to_json(turn) for turn in now.turns],
            "cache": None if cache is None else [_layer_to_json(layer) for layer in cache.layers],
        },
        "frozen": [bool(memory.frozen) for memory in memories],
        "audit": now.audit.to_dict(),
    }
    if cache is not None:
        for place, layer in enumerate(cache.layers):
            if layer.is_initialized:
                tensors[f"cache.{place}.keys"] = layer.keys.detach().cpu().contiguous()
                tensors[f"cache.{place}.values"] = layer.values.detach().cpu().contiguous()
    return content, tensors


def load(
    directory: str | os.PathLike,
    model: nn.Module,
    *,
    template: Mapping[str, Any] | None,
    generation: Mapping[str, Any] | None,
    adopt: bool,
) -> tuple[Now, dict[str, Any], dict[str, int]]:
    """``now``, ``settings`` and ``known`` of ``save``, to go on with on ``model``; see ``MemorySession.load``."""
    directory = as_path(directory, "directory")
    identity = identity_of(model)
    given = {"template": template, "generation": generation}
    own = {name: value for name, value in given.items() if value is not None}

    def make(manifest: dict[str, Any], files: dict[str, bytes]) -> tuple[Now, dict[str, Any], dict[str, int]]:
        path = directory / snapshots.MANIFEST
        content = {name: manifest[name] for name in manifest.keys() - snapshots.HEAD}
        if isinstance(content.get("settings"), dict):
            content["settings"] |= {name: {} for name in own}
        # The identity first: token ids of another model are not damage.
        check_identity(content.get("identity"), f"directory: {path}", FileFormatError)
        where = f"directory: {directory}: saved under"
        difference = check_made_under(content["identity"], identity.fingerprints(), adopt, where)
        check_content(content, f"directory: {path}", vocabulary_size(model), identity.config.segmented, FileFormatError)
        if files.keys() != {"state"}:
            raise FileFormatError(f"directory: {path}: files: got {sorted(files)}, allowed state")
        data_path = path.with_name(manifest["files"]["state"]["name"])

        def check(_, header: Header) -> None:
            _check_header(content, header, identity, f"directory: {data_path}")

        _, tensors = parse_tensors(files["state"], data_path, "directory", check)
        if difference:
            content["context"]["cache"] = None  # keys and values of another model
        now = _now(model, identity, content, tensors, data_path)
        return now, content["settings"] | own, {manifest["sha256"]: manifest["generation"]}

    return snapshots.read(directory, FORMAT, FORMAT_VERSION, make)


def _check_header(content: dict[str, Any], header: Header, identity, where: str) -> None:
    """Raise FileFormatError unless the data file holds exactly the tensors that the manifest calls for."""
    rows, specs = len(content["frozen"]), identity.layer_specs()
    wanted = {f"memory.{i}": ("F32", (rows, *spec.shape)) for i, spec in specs.items()}
    wanted["skipped"] = ("I32", (len(specs), rows))
    layers = {
        f"cache.{place}.{part}": layer
        for place, layer in enumerate(content["context"]["cache"] or ())
        if layer["filled"]
        for part in ("keys", "values")
    }
    if header.keys() != wanted.keys() | layers.keys():
        allowed = ", ".join(sorted([*wanted, *layers]))
        raise FileFormatError(f"{where}: holds {', '.join(sorted(header)):.1000}; allowed {allowed}")
    for name, entry in wanted.items():
        if header[name] != entry:
            raise FileFormatError(f"{where}: {name}: got {shown(header[name])}, allowed {entry}")
    for name, layer in layers.items():
        dtype, shape = header[name]
        length = layer["length"] if layer["window"] is None else min(layer["length"], layer["window"] - 1)
        if dtype not in FLOATS or len(shape) != 4 or shape[0] != 1 or shape[2] != length:
            allowed = f"floats [1, heads, {length}, size]"
            raise FileFormatError(f"{where}: {name}: got {shown(header[name])}, allowed {allowed}")


def _now(model: nn.Module, identity, content: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> Now:
    context = content["context"]
    *before, memory = _memories(identity, content["frozen"], tensors, path)
    turns = tuple(_turn_from_json(values, state) for values, state in zip(context["turns"], before, strict=True))
    cache = None if context["cache"] is None else _cache(model, identity, context["cache"], tensors)
    mark = None if cache is None else Mark(cache)
    preamble, messages = _block_from_json(context["preamble"]), tuple(content["messages"])
    audit = audit_from(content.get("audit", {"moves": (), "dropped": 0}))
    return Now(memory, messages, preamble, turns, context["written"], cache, mark, audit=audit)


def _memories(identity, frozen: list[bool], tensors: dict[str, torch.Tensor], path: Path) -> list[MemoryState]:
    specs = identity.layer_specs()
    for name in (*(f"memory.{i}" for i in specs), "skipped"):
        tensor = tensors[name]
        if not (tensor >= 0).all() if name == "skipped" else not tensor.isfinite().all():
            allowed = "counts, 0 or more" if name == "skipped" else "finite numbers"
            raise FileFormatError(f"directory: {path}: {name}: got others, allowed {allowed}")
    counts, found = dict(zip(specs, tensors["skipped"])), []
    for row, is_frozen in enumerate(frozen):
        layers = {i: tensors[f"memory.{i}"][row : row + 1].to(spec.device, copy=True) for i, spec in specs.items()}
        skipped = {i: counts[i][row : row + 1].to(spec.device, copy=True) for i, spec in specs.items()}
        found.append(MemoryState(layers, identity=identity, frozen=is_frozen, skipped=skipped))
    return found


def _cache(model: nn.Module, identity, kinds: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> Cache | None:
    """The saved cache; None where this model would hold another kind (dtype, sliding windows): it is built anew."""
    cache = new_cache(model)
    replace_layers(cache, identity)
    layers = decoder_of(unwrap(model)).layers
    if len(kinds) != len(cache.layers):
        return None
    for place, (kind, layer) in enumerate(zip(kinds, cache.layers)):
        weight = next(p for p in layers[place].parameters() if p.is_floating_point())
        if type(layer) not in _SAVED_LAYERS or kind["window"] != (layer.sliding_window if layer.is_sliding else None):
            return None
        if not kind["filled"]:
            continue
        keys, values = tensors[f"cache.{place}.keys"], tensors[f"cache.{place}.values"]
        if keys.dtype != weight.dtype or values.dtype != weight.dtype or weight.is_meta:
            return None
        if not _fits(layers[place], keys, values) or not (keys.isfinite().all() and values.isfinite().all()):
            return None
        layer.update(keys.to(weight.device), values.to(weight.device))
        if layer.is_sliding:
            layer.cumulative_length = kind["length"]
    return cache


def _fits(layer: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether keys and values [1, heads, T, D] are as wide as what the layer's projections make, where it has them."""
    attention = getattr(layer, "self_attn", None)
    for name, tensor in (("k_proj", keys), ("v_proj", values)):
        width = getattr(getattr(attention, name, None), "out_features", None)
        if width is not None and width != tensor.shape[1] * tensor.shape[3]:
            return False
    return keys.shape[:2] == values.shape[:2]


def _layer_to_json(layer) -> dict[str, Any]:
    return {
        "filled": layer.is_initialized,
        "length": int(layer.get_seq_length()),
        "window": layer.sliding_window if layer.is_sliding else None,
    }


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return {
        "messages": [dict(message) for message in turn.messages],
        "prompt": [_block_to_json(block) for block in turn.prompt],
        "answer": _block_to_json(turn.answer),
    }


def _turn_from_json(values: dict[str, Any], before: MemoryState) -> Turn:
    prompt = tuple(_block_from_json(block) for block in values["prompt"])
    return Turn(tuple(values["messages"]), prompt, _block_from_json(values["answer"]), before)


def _block_from_json(values: dict[str, Any]) -> Block:
    segments = values["segments"]
    segments = None if segments is None else tuple(segments)
    return Block(tuple(values["ids"]), segments, values.get("trust", 1.0), values.get("budget"))


def _block_to_json(block: Block) -> dict[str, Any]:
    """A block's fields; its trust and budget where it has any."""
    values = {"ids": block.ids, "segments": block.segments}
    return values | ({"trust": block.trust, "budget": block.budget} if block.held_back else {})
