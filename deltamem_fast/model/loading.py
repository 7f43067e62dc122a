"""The one way that commands load a model and its tokenizer: whatever is wrong there is one error that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import (
    ArgumentError,
    DeltaMemError,
    FileAccessError,
    FileFormatError,
    FileMissingError,
    MissingPackageError,
    StateError,
)

_LONG = 240  # characters of another library's error


def usable_device(device: torch.device | str, name: str = "device") -> torch.device:
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
        raise ArgumentError(f"{name}: got {str(device)!r}, which torch cannot use here ({one_line(error)})") from error
    return target


def found_model(name: str, argument: str = "MODEL") -> str:
    """A directory with a model in it, or what may be a hub id.

    Raises:
        FileNotFoundError, ValueError: neither.
    """
    if not name or "\0" in name:
        raise ArgumentError(f"{argument}: got {name!r}, allowed a model's directory or hub id")
    try:
        directory = Path(name).expanduser()
        is_directory = directory.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that nobody has
        raise ArgumentError(f"{argument}: got {name!r}, allowed a model's directory or hub id ({error})") from error
    if is_directory:
        if not (directory / "config.json").is_file():
            raise FileMissingError(f"{argument}: {name}: no model there (no config.json)")
        return str(directory)
    if directory.exists():
        raise ArgumentError(f"{argument}: {name}: a file, allowed a model's directory or hub id")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileMissingError(f"{argument}: {name}: no such directory")
    return name


def load_tokenizer(name: str, argument: str = "MODEL", **options: Any):
    """The tokenizer of a model, a directory or hub id. Code that lies beside it is not run.

    Raises:
        ValueError, OSError, ImportError: there is none, or a broken one; the message names it.
    """
    from transformers import AutoTokenizer

    with told(f"{argument}: {name}: its tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def load_weights(name: str, argument: str = "MODEL", device: torch.device | None = None, **options: Any) -> nn.Module:
    """A causal language model, a directory or hub id. Code that lies beside it is not run.

    Args:
        device: where it is moved to; None = where it was loaded to.
        options: of ``from_pretrained``.

    Raises:
        ValueError, OSError, ImportError: there is none, or a broken one; the message names it.
    """
    from transformers import AutoModelForCausalLM

    with told(f"{argument}: {name}"):
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
        return model if device is None else model.to(device)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """What libraries with errors of every kind raise inside, as one of ours in one line, behind ``what``."""
    try:
        yield
    except DeltaMemError as error:
        raise type(error)(f"{what}: {one_line(error)}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise StateError(f"{what}: out of memory ({one_line(error)})") from error
    except ImportError as error:
        raise MissingPackageError(f"{what}: {one_line(error)}") from error
    except OSError as error:
        raise FileAccessError(f"{what}: {one_line(error)}") from error
    except Exception as error:
        raise FileFormatError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException, most: int = _LONG) -> str:
    """What another library's error says, its type where that is not a built-in sentence of its own, in one line."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError | AttributeError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


@contextlib.contextmanager
def bars(*, hidden: bool) -> Iterator[None]:
    """transformers' progress bars, or none while something is loaded inside."""
    from transformers.utils import logging as library

    if not hidden or not library.is_progress_bar_enabled():
        yield
        return
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.enable_progress_bar()
