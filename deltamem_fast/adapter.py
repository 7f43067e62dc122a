"""Adapter files: the released format, and ours."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .config import CONFIG_NAME, DeltaMemConfig
from .errors import ArgumentError, ArgumentTypeError, FileFormatError, FileMissingError
from .files import as_path, read_tensors, write_atomically
from .memory import DeltaMemory
from .record import identity_of, record_of, unwrap

RELEASED_NAME = "delta_mem_adapter.pt"
SAFETENSORS_NAME = "delta_mem_adapter.safetensors"
FORMAT = "deltamem-adapter"
FORMAT_VERSION = 1
FORMATS = ("safetensors", "released")


@dataclass(frozen=True)
class AdapterSource:
    """An adapter before it is fitted to a model: its configuration and, unless fresh, its weights by released name."""

    config: DeltaMemConfig
    weights: dict[str, torch.Tensor] | None
    name: str


def read_adapter(adapter) -> AdapterSource:
    """Read what ``patch_model`` was given.

    Args:
        adapter: a directory, a hub id, a DeltaMemConfig, or None.

    Raises:
        TypeError: of another type.
        FileNotFoundError: a directory without an adapter, or an id that the hub does not have.
    """
    if adapter is None:
        return AdapterSource(DeltaMemConfig(), None, "a fresh adapter")
    if isinstance(adapter, DeltaMemConfig):
        return AdapterSource(adapter, None, "a fresh adapter")
    if not isinstance(adapter, str | os.PathLike):
        raise ArgumentTypeError(
            f"adapter: got {type(adapter).__name__}, allowed a directory, a hub id, a DeltaMemConfig or None"
        )
    directory = _directory_of(adapter)
    config = DeltaMemConfig.load(directory)
    return AdapterSource(config, read_weights(directory), str(adapter))


def _directory_of(adapter: str | os.PathLike) -> Path:
    path = as_path(adapter, "adapter")
    if path.is_dir():
        return path
    name = os.fspath(adapter)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise FileMissingError(f"adapter: got {name!r}, which is neither a directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, SAFETENSORS_NAME, RELEASED_NAME]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileMissingError(
            f"adapter: got {name!r}, which is no directory here and could not be had from the hub: {error}"
        ) from error


def read_weights(directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Weights by released name (``model.layers.0.self_attn.memory_q_proj``) from either format.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a file that is broken, of a newer format, or holds something else than named tensors.
    """
    directory = Path(directory)
    ours, released = directory / SAFETENSORS_NAME, directory / RELEASED_NAME
    if ours.is_file():
        return _read_safetensors(ours)
    if not released.is_file():
        raise FileMissingError(f"adapter: {directory} holds neither {SAFETENSORS_NAME} nor {RELEASED_NAME}")
    try:
        weights = torch.load(released, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileFormatError(f"adapter: {released} cannot be read as weights: {error}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()
    ):
        raise FileFormatError(f"adapter: {released} holds something else than named tensors")
    return weights


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    metadata, weights = read_tensors(path, "adapter")
    version = metadata.get("format_version", "")
    if metadata.get("format") != FORMAT or not version.isdigit() or not 1 <= int(version) <= FORMAT_VERSION:
        raise FileFormatError(
            f"adapter: {path} has format {metadata.get('format')!r} version {version!r}, this version reads "
            f"{FORMAT!r} 1 to {FORMAT_VERSION}"
        )
    return weights


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes, because NaN is not equal to itself and -0.0 is to 0.0.
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _canonical(name: str) -> str:
    # A patched decoder alone, without its language-model head, has no leading "model.".
    return name.removeprefix("model.")


def assign_weights(memories: dict[str, DeltaMemory], source: AdapterSource) -> None:
    """Copy the weights into freshly built memories, all checked before the first is copied.

    Args:
        memories: by attention name, e.g. ``model.layers.0.self_attn``.

    Raises:
        ValueError: a missing or unexpected name, or another shape; the message names both sides.
    """
    targets = {_canonical(f"{n}.{key}"): p for n, memory in memories.items() for key, p in memory.named_parameters()}
    weights = {_canonical(key): value for key, value in source.weights.items()}
    missing, unexpected = sorted(targets.keys() - weights.keys()), sorted(weights.keys() - targets.keys())
    if missing or unexpected:
        parts = [f"{what} {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                 for what, names in (("lacks", missing), ("has unexpected", unexpected)) if names]  # fmt: skip
        raise ArgumentError(f"adapter: {source.name} does not fit the model: of its weights it {' and '.join(parts)}")
    for key, parameter in targets.items():
        if weights[key].shape != parameter.shape:
            raise ArgumentError(
                f"adapter: {source.name} has {key} of shape {list(weights[key].shape)}, the model needs "
                f"{list(parameter.shape)}"
            )
    with torch.no_grad():
        for key, parameter in targets.items():
            parameter.copy_(weights[key])


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights on the CPU, by released name, in their own dtype."""
    return {
        f"{name.removesuffix('.delta_memory')}.{key}": value.detach().cpu().clone()
        for name, module in unwrap(model).named_modules()
        if isinstance(module, DeltaMemory)
        for key, value in module.state_dict().items()
    }


def export_adapter(model: nn.Module, directory: str | os.PathLike, format: str = "safetensors") -> Path:
    """Write the adapter of a patched model into ``directory``, each file atomically.

    Args:
        format: ``safetensors`` (ours: ``delta_mem_adapter.safetensors``), or ``released`` (what the released code
            reads: ``delta_mem_adapter.pt``, its configuration keys alone).

    Raises:
        ValueError: the model is not patched, or an unknown format.
    """
    if format not in FORMATS:
        raise ArgumentError(f"format: got {format!r}, allowed {', '.join(FORMATS)}")
    config = identity_of(model).config
    return write_adapter(directory, config, adapter_state_dict(model), format)


def write_adapter(directory, config: DeltaMemConfig, weights: dict[str, torch.Tensor], format: str) -> Path:
    """Write configuration and weights in either format; the weights first, so that a half-written one is no adapter."""
    directory = as_path(directory, "directory", expand=False)
    # Copies: one tensor under two names, or a view into a larger one, is neither refused nor written whole.
    weights = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    if format == "released":
        write_atomically(directory / RELEASED_NAME, lambda path: torch.save(weights, path), private=False)
    else:
        from safetensors.torch import save_file

        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "config": json.dumps(config.to_dict()),
        }
        write_atomically(directory / SAFETENSORS_NAME, lambda path: save_file(weights, path, metadata), private=False)
    config.save(directory, released=format == "released")
    # One directory holds one adapter: a file of the other format would be an older one.
    (directory / (SAFETENSORS_NAME if format == "released" else RELEASED_NAME)).unlink(missing_ok=True)
    return directory


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write the adapter of a patched model: ``delta_mem_adapter.safetensors`` and ``delta_mem_config.json``."""
    return export_adapter(model, directory, "safetensors")


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Replace the adapter's weights of a patched model by those in ``directory`` (a path or hub id).

    Raises:
        ValueError: the model is not patched, or the adapter has another configuration or other shapes; the
            message names both, and the model keeps its weights.
    """
    identity = identity_of(model)
    source = read_adapter(directory)
    if source.weights is None:
        raise ArgumentTypeError(f"directory: got {type(directory).__name__}, allowed an adapter's directory or hub id")
    ours, theirs = identity.config.to_dict(), source.config.to_dict()
    if ours != theirs:
        differing = ", ".join(f"{k} {theirs[k]!r} (the model's: {ours[k]!r})" for k in ours if ours[k] != theirs[k])
        raise ArgumentError(f"adapter: {source.name} has another configuration: {differing}; unpatch and patch again")
    memories = {
        name.removesuffix(".delta_memory"): module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, DeltaMemory)
    }
    before = identity.fingerprints()
    assign_weights(memories, source)
    # Memories made until now go on belonging to the old adapter.
    identity.kept_fingerprints = before
    record_of(unwrap(model)).identity = dataclasses.replace(
        identity, adapter_name=source.name, kept_fingerprints=None, accepted=[]
    )
    return model
