"""A model with a memory, and its tokenizer, for a chat: from the shipped weights, a directory, or the hub."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import torch
from torch import nn

from deltamem_kernels.dispatch import resolve_backend

from ..adapter.files import read_adapter
from ..errors import ArgumentError, MissingPackageError
from ..model.loading import bars, found_model, load_tokenizer, load_weights, told, usable_device

DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTIZED = ("4bit", "8bit")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
# What transformers quantises with.
_QUANTIZERS = ("bitsandbytes", "accelerate")


def load_for_chat(
    name: str,
    adapter: str | None,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    backend: str = "auto",
    quantize: str | None = None,
    attention: str | None = None,
    quiet: bool = False,
) -> tuple[nn.Module, Any]:
    """The patched model ``name`` (a directory or hub id), in eval mode, and its tokenizer.

    What can be wrong is told in the order of its cost: device, packages, adapter and tokenizer before the weights.

    Args:
        adapter: a directory or hub id, or None = fresh parameters.
        dtype: ``auto`` (as saved), ``bfloat16``, ``float16`` or ``float32``.
        device: as torch names it.
        backend: of the memory, see ``patch_model``.
        quantize: ``4bit`` (NF4) or ``8bit``, by bitsandbytes; None = the weights as they are.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``; None = transformers' choice.
        quiet: no progress bars.

    Raises:
        ValueError, OSError: no such model, adapter or device, or a tokenizer that cannot chat; the message names it.
        ImportError: a package is missing, which the message names.
    """
    from ..model.patch import patch_model  # transformers takes a while, and is not needed to parse arguments

    device = usable_device(device)
    resolve_backend(backend, device.type)
    name = found_model(name)
    if quantize is not None:
        require(_QUANTIZERS, "--quantize")
    if attention == "flash_attention_2":
        require(("flash_attn",), "--attention flash_attention_2")
    read_adapter(adapter)
    with bars(hidden=quiet or not sys.stderr.isatty()):
        tokenizer = _tokenizer(name)
        model = _weights(name, dtype, device, quantize, attention)
    return patch_model(model.eval().requires_grad_(False), adapter, backend=backend), tokenizer


def require(packages: tuple[str, ...], what: str) -> None:
    """Raise ImportError, naming the first of ``packages`` that cannot be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f"{what}: needs the package {package}, which cannot be imported here ({error}); pip install {package}"
            ) from error


def _tokenizer(name: str):
    tokenizer = load_tokenizer(name)
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(f"MODEL: {name}: its tokenizer: a slow one, allowed one with a tokenizer.json")
    if not tokenizer.chat_template:
        raise ArgumentError(
            f"MODEL: {name}: its tokenizer: has no chat template, allowed that of a chat (instruct) model"
        )
    return tokenizer


def _weights(name: str, dtype: str, device: torch.device, quantize: str | None, attention: str | None) -> nn.Module:
    from transformers import AutoConfig

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantize is None:
        return load_weights(name, device=device, **options)
    with told(f"MODEL: {name}"):
        own = AutoConfig.from_pretrained(name, trust_remote_code=False).dtype
    computes = own if dtype == "auto" else options["dtype"]
    # Quantised weights are made on their device; such a model cannot be moved.
    options |= {"quantization_config": _quantization(quantize, computes), "device_map": {"": device}}
    return load_weights(name, **options)


def _quantization(quantize: str, computes: torch.dtype | None):
    from transformers import BitsAndBytesConfig

    # It warns at every product that 8-bit ones are computed in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes)
