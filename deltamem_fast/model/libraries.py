"""What other libraries print, raise and need, as this package would say it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch

from ..display import shortened
from ..errors import DeltaMemError, FileAccessError, FileFormatError, MissingPackageError, StateError

_LONG = 240  # characters of another library's error


def require(packages: tuple[str, ...], what: str) -> None:
    """Raise ImportError, naming the first of ``packages`` that cannot be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f"{what}: needs the package {package}, which cannot be imported here ({error}); pip install {package}"
            ) from error


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


def one_line(error: BaseException) -> str:
    """What another library's error says, its type where that is not a built-in sentence of its own, in one line."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError | AttributeError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return shortened(text, _LONG)


@contextlib.contextmanager
def bars(*, hidden: bool) -> Iterator[None]:
    """transformers' progress bars, or none while something is loaded inside."""
    from transformers.utils import logging as library

    with contextlib.ExitStack() as afterwards:
        if hidden and library.is_progress_bar_enabled():
            library.disable_progress_bar()
            afterwards.callback(library.enable_progress_bar)
        yield
