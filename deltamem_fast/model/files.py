"""What a patched model is saved and loaded with by others: save_pretrained, push_to_hub, transformers' Trainer."""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..adapter.files import ADAPTER_FILES, adapter_state_dict, load_adapter, write_adapter
from ..adapter.record import PatchRecord, identity_of, record_of
from ..adapter.wrappers import unwrap
from ..config import CONFIG_NAME
from ..errors import ArgumentError
from ..notices import logger


def install_files(outer: nn.Module, model: nn.Module, record: PatchRecord) -> None:
    """Have the adapter saved and loaded beside the backbone's checkpoint, in files of its own.

    Args:
        outer: what was given to ``patch_model``: ``model`` itself, or PEFT's wrapper of it.
    """
    record.override(model, "load_state_dict", _load_state_dict)
    record.hooks.append(model.register_load_state_dict_post_hook(_restore_trainers))
    record.hooks.append(model.register_state_dict_post_hook(_save_beside_peft))
    if hasattr(model, "save_pretrained"):
        # The backbone's checkpoint stays one: from_pretrained of the bare class reads it.
        record.extend(model, "_keys_to_ignore_on_save", _keys(record))
        record.extend(model, "_keys_to_ignore_on_load_missing", [r"(^|\.)delta_memory\."])
        record.replace(model, "_get_files_timestamps", types.MethodType(_get_files_timestamps, model))
        record.override(model, "save_pretrained", _save_pretrained)
    if outer is not model and hasattr(type(outer), "save_pretrained"):  # other wrappers hand it on to the model
        record.override(outer, "save_pretrained", _save_pretrained_of_peft, "outer_save_pretrained")


def _keys(record: PatchRecord) -> list[str]:
    """The adapter's names in the model's state dict."""
    return [
        f"{name}.delta_memory.{key}"
        for name, attention in record.attentions.items()
        for key in attention.delta_memory.state_dict()
    ]


# --- saving


def _save_pretrained(self, save_directory, *args, **kwargs):
    """The backbone's own checkpoint, and beside it the adapter (``patch_model(model, save_directory)`` reads it).

    The adapter's weights are those of ``state_dict``, where one is given.

    Raises:
        ValueError: ``state_dict`` holds a part of the adapter; nothing is written.
    """
    original = record_of(self).original(self, "save_pretrained")
    given = inspect.signature(original).bind_partial(save_directory, *args, **kwargs).arguments
    writes, pushes = _writes_here(self, given.get("is_main_process", True)), given.get("push_to_hub", False)
    # Before the model's: it takes the tensors out of the state dict that it writes.
    weights = _weights_to_save(self, given.get("state_dict"))
    if weights is None and writes:
        logger.warning("save_pretrained: the given state_dict holds no adapter, so none is written")
    config, writes = identity_of(self).config, writes and weights is not None
    if writes and pushes:  # its end uploads the directory
        write_adapter(save_directory, config, weights, "safetensors")
    result = original(save_directory, *args, **kwargs)
    if writes and not pushes:
        write_adapter(save_directory, config, weights, "safetensors")
    return result


def _writes_here(model: nn.Module, is_main_process: bool) -> bool:
    # Of a model that transformers has sharded, one process writes, whatever the caller says.
    decide = getattr(model, "should_save_on_this_rank", None)
    return is_main_process if decide is None else decide(is_main_process)


def _weights_to_save(model: nn.Module, state_dict: dict | None) -> dict[str, torch.Tensor] | None:
    """The adapter's weights by released name; None: the given state dict has none of them."""
    if state_dict is None:
        return adapter_state_dict(model)
    keys = _keys(record_of(model))
    found = {key.replace(".delta_memory.", "."): state_dict[key] for key in keys if key in state_dict}
    if not found:
        return None
    if len(found) < len(keys):
        missing = [key for key in keys if key not in state_dict]
        raise ArgumentError(
            f"state_dict: lacks {len(missing)} of the adapter's {len(keys)} weights ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}); allowed all of them, or none"
        )
    return found


def _get_files_timestamps(self, working_dir):
    # What has been in the directory since before it is written is not uploaded; the adapter always is.
    found = type(self)._get_files_timestamps(self, working_dir)
    return {name: time for name, time in found.items() if name not in ADAPTER_FILES}


def _save_pretrained_of_peft(self, save_directory, *args, **kwargs):
    """PEFT's own files, and beside them the memory's adapter."""
    original = record_of(unwrap(self)).original(self, "save_pretrained", "outer_save_pretrained")
    result = original(save_directory, *args, **kwargs)
    weights = adapter_state_dict(self)
    if inspect.signature(original).bind_partial(save_directory, *args, **kwargs).arguments.get("is_main_process", True):
        write_adapter(save_directory, identity_of(self).config, weights, "safetensors")
    return result


def _save_beside_peft(model: nn.Module, state_dict, prefix: str, _) -> None:
    """The same for a wrapper that PEFT has put around a patched model (TRL's trainers do that).

    When such a wrapper saves, the model is asked for its state dict, and for nothing else.
    """
    peft = sys.modules.get("peft")
    if not prefix or peft is None or "outer_save_pretrained" in record_of(model).originals:
        return
    saving = inspect.unwrap(peft.PeftModel.save_pretrained).__code__
    values = next((frame.f_locals for frame in _callers() if frame.f_code is saving), None)
    if values is not None and unwrap(values["self"]) is model and values.get("is_main_process", True):
        write_adapter(values["save_directory"], identity_of(model).config, adapter_state_dict(model), "safetensors")


# --- loading


def _load_state_dict(self, state_dict, *args, **kwargs):
    """``load_state_dict``; the adapter is not missing where ``strict=False`` loads the backbone's own checkpoint."""
    record = record_of(self)
    result = record.original(self, "load_state_dict")(state_dict, *args, **kwargs)
    keys = set(_keys(record))
    if keys <= set(result.missing_keys):
        if _trainers_checkpoint() is None:
            logger.warning("load_state_dict: the state dict holds no adapter, so the model's stays as it is")
        result.missing_keys[:] = [key for key in result.missing_keys if key not in keys]
    return result


def _restore_trainers(model: nn.Module, incompatible) -> None:
    """After ``load_state_dict`` without the adapter, of the model or of PEFT's wrapper around it.

    If transformers' Trainer is restoring a checkpoint, the adapter beside it is loaded.
    """
    if not any(".delta_memory." in key for key in incompatible.missing_keys):
        return
    directory = _trainers_checkpoint()
    if directory is None:
        return
    if (Path(directory) / CONFIG_NAME).is_file():
        load_adapter(model, directory)
    else:
        logger.warning("%s: this checkpoint holds no adapter of the memory, so the model's stays as it is", directory)


def _trainers_checkpoint() -> str | os.PathLike | None:
    """The directory that the Trainer, further up the stack, is loading a model's weights from.

    The stack is the one place that tells. The Trainer reads the weights itself, gives the model a plain dict, hands the
    directory to no method of the model, and calls a TrainerCallback neither before nor after; its class is not ours to
    change. The adapter's weights within the model's own file would need no directory, but then that file were no
    checkpoint of the backbone any more.
    """
    if "transformers.trainer" not in sys.modules:
        return None
    from transformers import Trainer
    from transformers.trainer_utils import load_sharded_checkpoint

    for frame in _callers():
        code, values = frame.f_code, frame.f_locals
        first, second = (*code.co_varnames[: code.co_argcount], "", "")[:2]
        if code is load_sharded_checkpoint.__code__:  # (model, folder, …)
            return values[second]
        if isinstance(values.get(first), Trainer):
            if code.co_name == "_load_from_checkpoint":  # (self, resume_from_checkpoint, …)
                return values[second]
            if code.co_name == "_load_best_model":
                return values[first].state.best_model_checkpoint
    return None


def _callers() -> Iterator[types.FrameType]:
    """The frames of those who are calling, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
