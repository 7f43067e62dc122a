"""What the targets share: a folder of this process, models, and whether anything was half done."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from support import loud_adapter, tiny_model
from tokenizers_for_tests import thinking_tokenizer

from deltamem_fast import DeltaMemConfig, patch_model

DATA = Path(__file__).parents[2] / "deltamem_fast/data/eval"
BEFORE = Path(__file__).parents[1] / "written_before/memories_v1"  # files of versions before


@dataclass(frozen=True)
class Target:
    """Something that reads what comes from outside.

    Attributes:
        name: also of its folder in ``corpus``.
        reads: module and function, as ``module:function``, of what is tested.
        run: reads an input: returns, or raises a DeltaMemError. Whatever else it raises is a fault; an
            AssertionError: something was left half done, or a wrong value was let through.
        seeds: inputs that are whole, or nearly.
        form: see ``mutations.mutated``.
        examples: how many inputs ``make test`` tries.
    """

    name: str
    reads: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    form: str
    examples: int = 250


@functools.cache
def folder() -> Path:
    """A directory of this process alone, gone at its end."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="deltamem-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def written(data: bytes, name: str) -> Path:
    """A file with ``data``."""
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def untouched(*paths: Path) -> Iterator[None]:
    """Inside, these files are only read."""
    before = [path.read_bytes() for path in paths]
    yield_error = None
    try:
        yield
    except Exception as error:
        yield_error = error
    assert [path.read_bytes() for path in paths] == before, f"a file was changed by reading it: {paths}"
    if yield_error is not None:
        raise yield_error


@functools.cache
def tokenizer():
    return thinking_tokenizer()


@functools.cache
def model(strategy: str = "tsw"):
    """A tiny random model with a loud adapter; one of each strategy in a process."""
    special = {"eos_token_id": tokenizer().eos_token_id, "pad_token_id": tokenizer().pad_token_id}
    bare = tiny_model(vocab_size=len(tokenizer()), num_hidden_layers=2, **special)
    config = {"tsw": DeltaMemConfig.tsw, "ssw": DeltaMemConfig.ssw}[strategy]()
    return loud_adapter(patch_model(bare, config, backend="reference"))


def adapter_bits(strategy: str = "tsw") -> list[bytes]:
    """The adapter's weights of ``model``, to compare bit for bit."""
    with torch.no_grad():
        return [
            parameter.numpy().tobytes()
            for name, parameter in model(strategy).named_parameters()
            if ".delta_memory." in name
        ]


def whole_text(*texts: object) -> None:
    """Each is a text that a tokenizer takes."""
    for text in texts:
        assert isinstance(text, str), f"no text: {text!r:.80}"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise AssertionError(f"half of a surrogate pair was let through: {text!r:.80}") from error
