"""The one way that commands load a model and its tokenizer: whatever is wrong there is one error that names it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltamem_kernels.dispatch import resolve_backend

from ..adapter.files import read_adapter
from ..adapter.guard import guarding
from ..arguments import check_choice
from ..errors import ArgumentError, FileMissingError
from .known import KNOWN, default_adapter, is_known, known_directory
from .libraries import bars, one_line, require, told

DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTIZED = ("4bit", "8bit")
GUARDS = {"auto": "auto", "on": True, "off": False}  # what commands call it → ``guard`` of ``patch_model``
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
# What transformers quantises with.
_QUANTIZERS = ("bitsandbytes", "accelerate")
_ALLOWED = f"a model's directory or hub id, or {', '.join(KNOWN)}"


def usable_device(device: torch.device | str) -> torch.device:
    """``device``, if torch can use it here.

    Raises:
        ValueError: it cannot.
    """
    try:
        target = torch.device(device)
        if target.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=target)
    except Exception as error:  # torch has no kind of its own: RuntimeError, AssertionError, NotImplementedError
        raise ArgumentError(f"device: got {str(device)!r}, which torch cannot use here ({one_line(error)})") from error
    return target


def found_model(name: str, argument: str = "MODEL") -> str:
    """A directory with a model in it, a name of ``KNOWN``, or what may be a hub id.

    Raises:
        FileNotFoundError, ValueError: none of them.
    """
    if not name or "\0" in name:
        raise ArgumentError(f"{argument}: got {name!r}, allowed {_ALLOWED}")
    try:
        directory = Path(name).expanduser()
        is_directory = directory.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that nobody has
        raise ArgumentError(f"{argument}: got {name!r}, allowed {_ALLOWED} ({error})") from error
    if is_directory:
        if not (directory / "config.json").is_file():
            raise FileMissingError(f"{argument}: {name}: no model there (no config.json)")
        return str(directory)
    if directory.exists():
        raise ArgumentError(f"{argument}: {name}: a file, allowed {_ALLOWED}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileMissingError(f"{argument}: {name}: no such directory")
    return name


def device_for(backend: str) -> torch.device:
    """A GPU if there is one and ``backend`` runs there, else the CPU.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    gpu = torch.cuda.is_available() and backend in ("auto", "triton")
    device = torch.device("cuda" if gpu else "cpu")
    resolve_backend(backend, device.type)
    return device


def load_patched(
    name: str,
    adapter: str | None,
    argument: str = "MODEL",
    *,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    guard: str = "auto",
    **options: Any,
) -> tuple[nn.Module, Any]:
    """A model with a memory, and its tokenizer: ``load_model``, then ``patch_model``.

    What can be wrong is told in the order of its cost: device, backend, name and adapter before anything is loaded.

    Args:
        adapter: a directory or hub id, or None = the shipped one of a model in ``KNOWN``, of others fresh parameters.
        device: where the model is put.
        backend: of the memory, see ``patch_model``.
        guard: likewise; one of ``GUARDS``.
        options: others of ``load_model``.

    Raises:
        ValueError, OSError, ImportError: of ``load_model``, no such adapter or backend, or a guard that the adapter
            cannot have; the message names it.
    """
    from .patch import patch_model  # transformers takes a while, and is not needed to parse arguments

    device = usable_device(device)
    resolve_backend(backend, device.type)
    check_choice(guard, "guard", tuple(GUARDS))
    found_model(name, argument)
    adapter = default_adapter(name) if adapter is None else adapter
    guarding(GUARDS[guard], read_adapter(adapter).config.rule)
    model, tokenizer = load_model(name, argument, device=device, **options)
    return patch_model(model, adapter, backend=backend, guard=GUARDS[guard]), tokenizer


def load_model(
    name: str,
    argument: str = "MODEL",
    *,
    device: torch.device | str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    attention: str | None = None,
    tokenizer: bool = True,
    check_tokenizer: Callable[[Any], None] | None = None,
    local: bool = False,
    quiet: bool = False,
) -> tuple[nn.Module, Any]:
    """A causal language model, frozen and in eval mode, and its tokenizer. Code that lies beside them is not run.

    Args:
        name: a directory or hub id, or a name of ``KNOWN``.
        argument: what errors call ``name``.
        device: where the model is put, as torch names it; None = where it is loaded to.
        dtype: one of ``DTYPES``; ``auto`` = as saved.
        quantize: one of ``QUANTIZED``, by bitsandbytes (4bit: NF4); None = the weights as they are.
        attention: one of ``ATTENTIONS``; None = transformers' choice.
        tokenizer: it is wanted; otherwise None stands in its place.
        check_tokenizer: is given the tokenizer before the weights are read, and raises if it will not do.
        local: nothing is downloaded.
        quiet: no progress bars, nor at a terminal. Anywhere else they would stand in front of an error's one line.

    Raises:
        ValueError, OSError, ImportError: no such model or device, a broken model or tokenizer, or a package is
            missing; the message names it.
    """
    device = None if device is None else usable_device(device)
    known, name = is_known(name), found_model(name, argument)
    if quantize is not None:
        require(_QUANTIZERS, "--quantize")
    if attention == "flash_attention_2":
        require(("flash_attn",), "--attention flash_attention_2")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if known:
        name = known_directory(name, argument, local=local)
    found, common = None, {"trust_remote_code": False, "local_files_only": local}
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    with bars(hidden=quiet or not sys.stderr.isatty()):
        if tokenizer:
            with told(f"{argument}: {name}: its tokenizer"):
                found = AutoTokenizer.from_pretrained(name, **common)
        if check_tokenizer is not None:
            check_tokenizer(found)
        with told(f"{argument}: {name}"):
            if quantize is not None:
                computes = AutoConfig.from_pretrained(name, **common).dtype if dtype == "auto" else options["dtype"]
                # Quantised weights are made on their device; such a model cannot be moved.
                place = {} if device is None else {"device_map": {"": device}}
                options |= {"quantization_config": _quantization(quantize, computes)} | place
            model = AutoModelForCausalLM.from_pretrained(name, **common, **options)
            if device is not None and quantize is None:
                model = model.to(device)
    return model.eval().requires_grad_(False), found


def _quantization(quantize: str, computes: torch.dtype | None):
    from transformers import BitsAndBytesConfig

    # It warns at every product that 8-bit ones are computed in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes)
