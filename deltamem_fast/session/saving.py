"""A session's files: JSON for what was said and set, safetensors for memories, keys and values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..cache import _replace_layers
from ..errors import ArgumentTypeError, FileFormatError
from ..files import read_tensors
from ..record import decoder_of, describe_difference, identity_of, unwrap
from ..state import MemoryState
from ..storage import snapshots
from .blocks import Block
from .turns import Now
from .window import Mark, Turn, new_cache

if TYPE_CHECKING:
    from .session import MemorySession

FORMAT, FORMAT_VERSION = "deltamem-session", 1


def save(session: MemorySession, directory: str | os.PathLike, *, with_cache: bool) -> Path:
    """Write a session; see ``MemorySession.save``."""
    content, tensors = contents(session, with_cache=with_cache)
    return commit(directory, content, tensors)


def commit(directory: str | os.PathLike, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write ``contents`` of a session into a directory, atomically."""
    from safetensors.torch import save_file

    write = {"state": lambda path: save_file(tensors, path, {"format": FORMAT})}
    try:
        return snapshots.commit(directory, FORMAT, FORMAT_VERSION, content, write)
    except TypeError as error:
        raise ArgumentTypeError(
            f"session: its messages, template and generation settings must be JSON to be saved: {error}"
        ) from error


def contents(session: MemorySession, *, with_cache: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a snapshot holds: JSON, and tensors on the CPU."""
    now = session._now
    memories = [*(turn.before for turn in now.turns), now.memory]
    tensors = {
        f"memory.{layer}": torch.cat([memory[layer].detach().cpu() for memory in memories]) for layer in now.memory
    }
    tensors["skipped"] = torch.stack(
        [torch.cat([memory._skipped[layer].cpu() for memory in memories]) for layer in now.memory]
    )
    cache = now.window() if with_cache else None
    content = {
        "identity": identity_of(session.model).fingerprints(),
        "settings": {
            "system": session.system,
            "context_turns": session.limits.turns,
            "context_tokens": session.limits.tokens,
            "template": session.template,
            "generation": session.generation,
            "remembers": session.remembers,
        },
        "messages": [dict(message) for message in now.messages],
        "context": {
            "preamble": _block_to_json(now.preamble),
            "written": now.written,
            "turns": [_turn_to_json(turn) for turn in now.turns],
            "cache": None if cache is None else [_layer_to_json(layer) for layer in cache.layers],
        },
        "frozen": [memory.frozen for memory in memories],
    }
    if cache is not None:
        for place, layer in enumerate(cache.layers):
            if layer.is_initialized:
                tensors[f"cache.{place}.keys"] = layer.keys.detach().cpu().contiguous()
                tensors[f"cache.{place}.values"] = layer.values.detach().cpu().contiguous()
    return content, tensors


def load(kind: type[MemorySession], directory: str | os.PathLike, model: nn.Module, tokenizer) -> MemorySession:
    """Read a session; see ``MemorySession.load``."""
    identity = identity_of(model)

    def make(manifest: dict[str, Any], files: dict[str, Path]) -> MemorySession:
        difference = describe_difference(manifest["identity"], identity.fingerprints())
        if difference:
            raise FileFormatError(f"directory: {directory}: saved under {difference}")
        _, tensors = read_tensors(files["state"], "directory")
        settings = dict(manifest["settings"])
        remembers = settings.pop("remembers")
        session = kind(model, tokenizer, **settings)
        session._now = _now(model, identity, manifest, tensors)
        session._remembers = remembers
        return session

    return snapshots.read(directory, FORMAT, FORMAT_VERSION, make)


def _now(model: nn.Module, identity, manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Now:
    context = manifest["context"]
    *before, memory = _memories(identity, manifest["frozen"], tensors)
    turns = tuple(_turn_from_json(values, state) for values, state in zip(context["turns"], before, strict=True))
    cache = None if context["cache"] is None else _cache(model, identity, context["cache"], tensors)
    return Now(
        memory,
        tuple(manifest["messages"]),
        _block_from_json(context["preamble"]),
        turns,
        context["written"],
        cache,
        None if cache is None else Mark(cache),
    )


def _memories(identity, frozen: list[bool], tensors: dict[str, torch.Tensor]) -> list[MemoryState]:
    specs = identity.layer_specs()
    found = []
    for row, is_frozen in enumerate(frozen):
        layers = {i: tensors[f"memory.{i}"][row : row + 1].to(spec.device, copy=True) for i, spec in specs.items()}
        skipped = {
            i: tensors["skipped"][place, row : row + 1].to(spec.device, copy=True)
            for place, (i, spec) in enumerate(specs.items())
        }
        found.append(MemoryState(layers, identity=identity, frozen=is_frozen, skipped=skipped))
    return found


def _cache(model: nn.Module, identity, kinds: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> Cache | None:
    """The saved cache; None where this model would hold another kind (dtype, sliding windows): it is built anew."""
    cache = new_cache(model)
    _replace_layers(cache, identity)
    layers = decoder_of(unwrap(model)).layers
    if len(kinds) != len(cache.layers):
        return None
    for place, (kind, layer) in enumerate(zip(kinds, cache.layers)):
        weight = next(p for p in layers[place].parameters() if p.is_floating_point())
        if kind["window"] != (layer.sliding_window if layer.is_sliding else None):
            return None
        if not kind["filled"]:
            continue
        keys, values = tensors[f"cache.{place}.keys"], tensors[f"cache.{place}.values"]
        if keys.dtype != weight.dtype:
            return None
        layer.update(keys.to(weight.device), values.to(weight.device))
        if layer.is_sliding:
            layer.cumulative_length = kind["length"]
    return cache


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


def _block_to_json(block: Block) -> dict[str, Any]:
    return {"ids": list(block.ids), "segments": None if block.segments is None else list(block.segments)}


def _block_from_json(values: dict[str, Any]) -> Block:
    segments = values["segments"]
    return Block(tuple(values["ids"]), None if segments is None else tuple(segments))
