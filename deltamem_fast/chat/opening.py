"""How a chat begins: what the arguments ask for, then the model, then the session."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import without_surrogates
from ..errors import ArgumentError, FileMissingError
from ..model.loading import device_for, load_patched
from ..model.threads import check_threads
from ..recall.weights import find_weights
from ..storage.files import as_path
from ..storage.snapshots import MANIFEST
from .options import OPTIONS, Value, generation_with, read_option

if TYPE_CHECKING:
    from .conversation import Chat
    from .screens import Screen

CONTEXT_TURNS = 4
STRATEGY = "msw"
SMALL_WORLD = "small-world"
HISTORY = "DELTAMEM_HISTORY"  # the environment's word for the file of what was typed


@dataclass(frozen=True)
class Opening:
    """What a chat begins with.

    Attributes:
        model, adapter: directories or hub ids; no adapter: fresh parameters.
        name: of the model, short.
        small_world: it is the shipped backbone.
        loading: other arguments of ``load_patched``.
        directory: of a saved session to go on with, or None.
        system, template: of a new session.
        limits: ``turns`` and ``tokens``, as far as they were given.
        options: of the answers, as far as they were given.
        seed: of sampling, or None.
        threads: of PyTorch on a CPU, or None = as many as fit the model.
    """

    model: str
    adapter: str | None
    name: str
    small_world: bool
    loading: dict[str, Any]
    directory: str | None
    system: str | None
    template: dict[str, Any]
    limits: dict[str, int | None]
    options: dict[str, Value]
    seed: int | None
    threads: int | None = None


def read_arguments(arguments: argparse.Namespace) -> Opening:
    """What the arguments of ``deltamem chat`` ask for.

    Raises:
        ValueError, OSError: an argument that is wrong, or does not go with another; the message names it.
    """
    shipped = arguments.model is None
    if shipped and arguments.adapter is not None:
        raise ArgumentError("--adapter: given without MODEL, which it belongs to")
    if not shipped and arguments.strategy is not None:
        raise ArgumentError(
            "--strategy: given with MODEL, allowed for the shipped adapters alone; --adapter names yours"
        )
    model, adapter = arguments.model, arguments.adapter
    if shipped:
        found = find_weights()
        model, adapter = str(found.backbone), str(found.adapters[arguments.strategy or STRATEGY])
    texts = {name: getattr(arguments, name) for name in OPTIONS}
    options = {
        name: read_option(name, text, f"--{name.replace('_', '-')}") for name, text in texts.items() if text is not None
    }
    texts = {"turns": arguments.context_turns, "tokens": arguments.context_tokens}
    limits = {name: _limit(f"--context-{name}", text) for name, text in texts.items() if text is not None}
    if arguments.load is not None:
        _check_load(arguments)
    return Opening(
        model=model,
        adapter=adapter,
        name=SMALL_WORLD if shipped else Path(model).name or model,
        small_world=shipped,
        loading={
            "dtype": arguments.dtype,
            "device": arguments.device or device_for(arguments.backend),
            "backend": arguments.backend,
            "quantize": arguments.quantize,
            "attention": arguments.attention,
            "quiet": shipped,
        },
        directory=arguments.load,
        system=None if arguments.system is None else without_surrogates(arguments.system),
        template={} if arguments.thinking is None else {"enable_thinking": arguments.thinking},
        limits=limits,
        seed=options.pop("seed", None),
        options=options,
        threads=check_threads(arguments.threads),
    )


def _limit(argument: str, text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise ArgumentError(f"{argument}: got {text!r}, allowed an integer, 1 or more, or all")
    return int(text)


def _check_load(arguments: argparse.Namespace) -> None:
    for argument, value in (("--system", arguments.system), ("--thinking, --no-thinking", arguments.thinking)):
        if value is not None:
            raise ArgumentError(f"{argument}: given with --load, whose session has its own")
    if not (as_path(arguments.load, "--load") / MANIFEST).is_file():
        raise FileMissingError(f"--load: {arguments.load}: no session there (no {MANIFEST})")


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """transformers says errors only: its warnings would stand in the middle of answers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def can_chat(tokenizer) -> None:
    """Raise ValueError, naming the model, if its tokenizer cannot chat."""
    where = f"MODEL: {tokenizer.name_or_path}: its tokenizer"
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(f"{where}: a slow one, allowed one with a tokenizer.json")
    if not tokenizer.chat_template:
        raise ArgumentError(f"{where}: has no chat template, allowed that of a chat (instruct) model")


def open_chat(opening: Opening, screen: Screen) -> Chat:
    """Load the model and make, or load, the session.

    Raises:
        ValueError, OSError, ImportError: see ``load_patched`` and ``MemorySession``.
    """
    from ..session import MemorySession  # transformers takes a while, and is not needed to parse arguments
    from .conversation import Chat, load_session

    model, tokenizer = load_patched(opening.model, opening.adapter, check_tokenizer=can_chat, **opening.loading)
    if opening.adapter is None:
        print(
            "deltamem: warning: no --adapter: the memory's parameters are fresh and untrained; they disturb answers "
            "rather than remember (/off: without them)",
            file=sys.stderr,
            flush=True,
        )
    if opening.directory is None:
        limits = {"turns": CONTEXT_TURNS, "tokens": None} | opening.limits
        session = MemorySession(
            model,
            tokenizer,
            system=opening.system,
            context_turns=limits["turns"],
            context_tokens=limits["tokens"],
            template=opening.template,
            generation=generation_with({}, opening.options),
        )
    else:
        session = load_session(opening.directory, model, tokenizer, "--load")
        limits = {"turns": session.limits.turns, "tokens": session.limits.tokens} | opening.limits
        session.limit_context(**limits)
        session.generation = generation_with(session.generation, opening.options)
    chat = Chat(session, screen, small_world=opening.small_world, seed=opening.seed)
    if opening.directory is not None:
        chat.saved(opening.directory)
    return chat
