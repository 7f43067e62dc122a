"""Adapter files: the released format, and ours."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..arguments import check_choice, check_type, shown
from ..config import CONFIG_NAME, DeltaMemConfig
from ..errors import ArgumentError, ArgumentTypeError, FileFormatError, FileMissingError
from ..storage.files import as_path, naming_files, parse_json, write_atomically
from ..storage.tensors import FLOATS, Header, check_seal, read_tensors, save_tensors, seal
from .identity import new_token
from .layer import DeltaMemory
from .record import identity_of, record_of
from .released_file import read_released
from .shipped import SHIPPED
from .wrappers import unwrap

RELEASED_NAME = "delta_mem_adapter.pt"
SAFETENSORS_NAME = "delta_mem_adapter.safetensors"
FORMAT = "deltamem-adapter"
FORMAT_VERSION = 1
FORMATS = ("safetensors", "released")
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_NAME, RELEASED_NAME)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter before it is fitted to a model.

    Attributes:
        config: its configuration.
        directory: where its weights are, or None: a fresh one.
        name: for messages.
    """

    config: DeltaMemConfig
    directory: Path | None
    name: str

    @property
    def weights(self) -> dict[str, torch.Tensor] | None:
        """Its weights by released name, read now; None of a fresh one."""
        return None if self.directory is None else read_weights(self.directory)


def read_adapter(adapter) -> AdapterSource:
    """Read what ``patch_model`` was given.

    Args:
        adapter: a directory, a name of ``SHIPPED``, a hub id, a DeltaMemConfig, None, or what this has read, which
            comes back as it is.

    Raises:
        TypeError: of another type.
        FileNotFoundError: a directory without an adapter, or an id that the hub does not have.
        ValueError: a broken adapter, as far as its files' headers tell.
    """
    if isinstance(adapter, AdapterSource):
        return adapter
    if adapter is None or isinstance(adapter, DeltaMemConfig):
        return AdapterSource(adapter or DeltaMemConfig(), None, "a fresh adapter")
    check_type(adapter, "adapter", str | os.PathLike, "a directory, a hub id, a DeltaMemConfig or None")
    directory = _directory_of(adapter)
    config = DeltaMemConfig.load(directory)
    with contextlib.suppress(_HeaderRead):
        read_weights(directory, _stop)
    return AdapterSource(config, directory, str(adapter))


class _HeaderRead(Exception):
    pass


def _stop(header: Header) -> None:
    raise _HeaderRead


def _directory_of(adapter: str | os.PathLike) -> Path:
    path = as_path(adapter, "adapter")
    if path.is_dir():
        return path
    name = os.fspath(adapter)
    if name in SHIPPED:
        return SHIPPED[name]
    if path.exists() or name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise FileMissingError(f"adapter: got {name!r:.80}, which is neither a directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(ADAPTER_FILES)))
    except Exception as error:  # of the hub, of the HTTP library that its version uses, of the system
        raise FileMissingError(
            f"adapter: got {name!r:.80}, which is no directory here and could not be had from the hub: {error}"
        ) from error


def read_weights(
    directory: str | os.PathLike, check: Callable[[Header], None] | None = None
) -> dict[str, torch.Tensor]:
    """Weights by released name (``model.layers.0.self_attn.memory_q_proj``) from either format.

    Args:
        check: is given every tensor's dtype and shape before the first is read; raises.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a file that is damaged, of a newer format, was written with another configuration than the one
            beside it, or holds something else than named tensors of floats.
    """
    directory = as_path(directory, "adapter")
    ours, released = directory / SAFETENSORS_NAME, directory / RELEASED_NAME

    def check_all(path: Path, header: Header) -> None:
        for key, (dtype, _) in header.items():
            if dtype not in FLOATS:
                raise FileFormatError(f"adapter: {path} has {key:.200} of {dtype:.20}, allowed {', '.join(FLOATS)}")
        if check is not None:
            check(header)

    if ours.is_file():
        return _read_safetensors(ours, check_all)
    if not released.is_file():
        raise FileMissingError(f"adapter: {directory} holds neither {SAFETENSORS_NAME} nor {RELEASED_NAME}")
    return read_released(released, "adapter", lambda header: check_all(released, header))


def _read_safetensors(path: Path, check: Callable[[Path, Header], None]) -> dict[str, torch.Tensor]:
    def check_all(metadata: Mapping[str, str], header: Header) -> None:
        version = metadata.get("format_version", "")
        readable = version.isascii() and version.isdigit() and len(version) < 9 and 1 <= int(version) <= FORMAT_VERSION
        if metadata.get("format") != FORMAT or not readable:
            raise FileFormatError(
                f"adapter: {path} has format {metadata.get('format')!r:.80} version {version!r:.20}, "
                f"this version reads {FORMAT!r} 1 to {FORMAT_VERSION}"
            )
        if "config" in metadata and (path.parent / CONFIG_NAME).is_file():
            _check_config(path, metadata["config"])
        check(path, header)

    metadata, weights = read_tensors(path, "adapter", check_all)
    if "sha256" in metadata:  # the first versions wrote none
        check_seal(path, "adapter", metadata, weights)
    return weights


def _check_config(path: Path, written: str) -> None:
    """Raise if the configuration file is not the one that the weights were written with.

    A save that was interrupted between the two files leaves such a pair.
    """
    values = parse_json(written, f"{path}: its metadata's entry 'config'", "adapter")
    try:
        ours = DeltaMemConfig.from_dict({"format_version": 1} | values).to_dict()
    except ValueError as error:
        raise FileFormatError(f"adapter: {path}: its configuration: {error}") from error
    beside = DeltaMemConfig.load(path.parent).to_dict()
    if ours != beside:
        raise FileFormatError(
            f"adapter: {path} was written with another configuration than {CONFIG_NAME} beside it has: "
            f"{_differing(ours, beside, CONFIG_NAME)}; was a save interrupted?"
        )


def _differing(values: dict, others: dict, whose: str) -> str:
    """The entries of a configuration that are others in another, ``whose`` that is, in words."""
    return ", ".join(f"{k} {values[k]!r:.80} ({whose}: {others[k]!r:.80})" for k in values if values[k] != others[k])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes, because NaN is not equal to itself and -0.0 is to 0.0.
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def canonical_name(name: str) -> str:
    """A weight's name without what stands before its decoder's layers.

    A decoder is ``model`` in a language model, ``transformer`` or ``model.language_model`` in others, nothing alone.
    """
    found = re.search(r"(?:^|\.)(layers\.\d+\..*)", name)
    return name.removeprefix("model.") if found is None else found[1]


def assign_weights(memories: Mapping[str, DeltaMemory], source: AdapterSource) -> None:
    """Copy an adapter's weights into memories; ``stage_weights`` checks them all before the first is copied.

    Args:
        memories: by attention name, e.g. ``model.layers.0.self_attn``.

    Raises:
        ValueError: as ``stage_weights``; the memories keep their weights.
    """
    staged = stage_weights(memories, source)
    targets = _targets(memories)
    with torch.no_grad():
        before = {key: parameter.clone() for key, parameter in targets.items()}
        try:
            for key, parameter in targets.items():
                parameter.copy_(staged[key])
        except BaseException:  # Ctrl-C, too
            for key, old in before.items():
                targets[key].copy_(old)
            raise


def stage_weights(memories: Mapping[str, DeltaMemory], source: AdapterSource) -> dict[str, torch.Tensor]:
    """An adapter's weights on the CPU, by canonical name, in the dtypes of the memories' parameters.

    Names and shapes are compared by the files' headers, before a tensor is read.

    Args:
        memories: by attention name; on ``meta``, if only their shapes and dtypes are there yet.

    Raises:
        ValueError: a missing or unexpected name, another shape, a number that is not finite or that the parameter's
            dtype cannot hold, a parameter that is sharded; the message names both sides.
    """
    targets = _targets(memories)
    for key, parameter in targets.items():
        if type(parameter) is not nn.Parameter or not parameter.dtype.is_floating_point:
            raise ArgumentError(
                f"model: {key} is a {type(parameter).__name__} of {parameter.dtype}; load the adapter before the "
                "model is sharded or quantised"
            )
    weights = read_weights(source.directory, lambda header: _check_fit(header, targets, source.name))
    staged = {}
    for name, value in weights.items():
        key = canonical_name(name)
        staged[key] = value.to(targets[key].dtype)
        if not torch.isfinite(staged[key]).all():
            finite = bool(torch.isfinite(value).all())
            what = f"a number that {targets[key].dtype} cannot hold" if finite else "a number that is not finite"
            raise FileFormatError(f"adapter: {source.name} has {what} in {key}")
    return staged


def _targets(memories: Mapping[str, DeltaMemory]) -> dict[str, nn.Parameter]:
    found = {canonical_name(f"{n}.{key}"): p for n, memory in memories.items() for key, p in memory.named_parameters()}
    if len(found) < sum(len(list(memory.parameters())) for memory in memories.values()):
        raise ArgumentError(f"model: two of its layers have one name after what stands before it: {sorted(memories)}")
    return found


def _check_fit(header: Header, targets: Mapping[str, nn.Parameter], name: str) -> None:
    shapes = {canonical_name(key): shape for key, (_, shape) in header.items()}
    if len(shapes) < len(header):
        raise FileFormatError(f"adapter: {name} has two weights for one layer, with other names before it")
    missing, unexpected = sorted(targets.keys() - shapes.keys()), sorted(shapes.keys() - targets.keys())
    if missing or unexpected:
        parts = [f"{what} {len(names)} ({', '.join(names[:3]):.300}{', …' if len(names) > 3 else ''})"
                 for what, names in (("lacks", missing), ("has unexpected", unexpected)) if names]  # fmt: skip
        raise FileFormatError(f"adapter: {name} does not fit the model: of its weights it {' and '.join(parts)}")
    for key, parameter in targets.items():
        if shapes[key] != tuple(parameter.shape):
            raise FileFormatError(
                f"adapter: {name} has {key} of shape {shown(list(shapes[key]))}, the model needs "
                f"{list(parameter.shape)}"
            )


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights on the CPU, by released name, in their own dtype.

    Sharded ones are gathered, so that every process has to call it; offloaded ones are fetched.
    """
    found = {}
    for name, attention in record_of(unwrap(model)).attentions.items():
        # PEFT's modules_to_save puts a wrapper there, which hands attributes on to the copy that it trains.
        with _weights_here(attention.delta_memory.correct.__self__) as memory:
            for key, value in memory.state_dict().items():
                value = value.detach()
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                if value.is_meta:
                    raise ArgumentError(f"adapter: {name}.{key} is on the meta device, where it has no values")
                found[f"{name}.{key}"] = value.cpu().clone()
    return found


@contextlib.contextmanager
def _weights_here(memory: DeltaMemory) -> Iterator[DeltaMemory]:
    """Inside, the parameters of a memory that accelerate offloads are where it computes."""
    if not any(parameter.device.type == "meta" for parameter in memory.parameters()) or not hasattr(memory, "_hf_hook"):
        yield memory
        return
    from accelerate.utils import align_module_device

    with align_module_device(memory):
        yield memory


def export_adapter(model: nn.Module, directory: str | os.PathLike, format: str = "safetensors") -> Path:
    """Write the adapter of a patched model into ``directory``, each file atomically.

    Args:
        format: ``safetensors`` (ours: ``delta_mem_adapter.safetensors``), or ``released`` (what the released code
            reads: ``delta_mem_adapter.pt``, its configuration keys alone).

    Raises:
        ValueError: the model is not patched, an unknown format, or a weight is not finite (then nothing is written).
    """
    check_choice(format, "format", FORMATS)
    config = identity_of(model).config
    return write_adapter(directory, config, adapter_state_dict(model), format)


def write_adapter(
    directory, config: DeltaMemConfig, weights: dict[str, torch.Tensor], format: str, *, finite: bool = True
) -> Path:
    """Write configuration and weights in either format, so that an interrupted one is the old adapter or none.

    The weights come first, then a file of the other format goes, then the configuration is written. Our weights say
    which configuration they were written with; before released ones another configuration is removed.

    Args:
        finite: refuse NaN and Inf, which no model takes; False: another file's weights, whatever they are.
    """
    directory = as_path(directory, "directory")
    for key, value in weights.items():  # what no model would take must not replace an adapter
        if value.dtype not in _DTYPES:
            raise ArgumentError(f"adapter: {key} is {value.dtype}, allowed {', '.join(map(str, _DTYPES))}")
        if finite and not bool(value.isfinite().all()):
            raise ArgumentError(f"adapter: {key} holds NaN or Inf, which a file must not; nothing was written")
    # Copies: one tensor under two names, or a view into a larger one, is neither refused nor written whole.
    weights = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    if format == "released":

        def write(path: Path) -> None:
            data = io.BytesIO()  # torch's own writing of files has errors of its own for a full disk
            torch.save(weights, data)
            path.write_bytes(data.getbuffer())
            if not _has_config(directory, config):
                (directory / CONFIG_NAME).unlink(missing_ok=True)

        write_atomically(directory / RELEASED_NAME, write, private=False)
    else:
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "config": json.dumps(config.to_dict()),
        }
        metadata["sha256"] = seal(metadata, weights)
        path = directory / SAFETENSORS_NAME
        write_atomically(path, lambda temporary: save_tensors(weights, temporary, metadata), private=False)
    # One directory holds one adapter: a file of the other format would be an older one.
    with naming_files("directory", directory):
        (directory / (SAFETENSORS_NAME if format == "released" else RELEASED_NAME)).unlink(missing_ok=True)
    config.save(directory, released=format == "released")
    return directory


def _has_config(directory: Path, config: DeltaMemConfig) -> bool:
    try:
        return DeltaMemConfig.load(directory) == config
    except (OSError, ValueError):  # none, or a damaged one
        return False


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
    if source.directory is None:
        raise ArgumentTypeError(f"directory: got {type(directory).__name__}, allowed an adapter's directory or hub id")
    ours, theirs = identity.config.to_dict(), source.config.to_dict()
    if ours != theirs:
        differing = _differing(theirs, ours, "the model's")
        raise FileFormatError(f"adapter: {source.name} has another configuration: {differing}; unpatch and patch again")
    attentions = record_of(unwrap(model)).attentions
    memories = {name: attention.delta_memory.correct.__self__ for name, attention in attentions.items()}
    for name, memory in memories.items():
        if any(parameter.device.type == "meta" for parameter in memory.parameters()):
            raise ArgumentError(f"model: the adapter of {name} is offloaded; load the adapter before that")
    before = identity.fingerprints()
    assign_weights(memories, source)
    # Memories made until now go on belonging to the old adapter.
    identity.kept_fingerprints = before
    record_of(unwrap(model)).identity = dataclasses.replace(
        identity, adapter_name=source.name, kept_fingerprints=None, accepted=[], token=new_token()
    )
    return model
