"""How a chat begins: what the arguments ask for, then the model, then the session."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import without_surrogates
from ..errors import ArgumentError, FileMissingError
from ..model.loading import device_for, load_patched
from ..model.threads import check_threads
from ..notices import logger
from ..recall.weights import find_weights
from ..storage.files import as_path
from ..storage.snapshots import MANIFEST
from .options import OPTIONS, Value, generation_with, read_limit, read_option

if TYPE_CHECKING:
    from .conversation import Chat
    from .screens import PlainScreen
    from .terminal import TerminalScreen

CONTEXT_TURNS = 4
STRATEGY = "msw"
SMALL_WORLD = "small-world"
HISTORY = "DELTAMEM_HISTORY"  # the environment's word for the file of what was typed


@dataclass(frozen=True)
class Opening:
    """What a chat begins with.

    Attributes:
        name: of the model, short.
        small_world: it is the shipped backbone.
        loading: arguments of ``load_patched``; no adapter: fresh parameters.
        directory: of a saved session to go on with, or None.
        settings: ``system`` and ``template`` of a new session.
        limits: ``turns`` and ``tokens``, as far as they were given.
        options: of the answers, as far as they were given.
        seed: of sampling, or None.
        threads: of PyTorch on a CPU, or None = as many as fit the model.
    """

    name: str
    small_world: bool
    loading: dict[str, Any]
    directory: str | None
    settings: dict[str, Any]
    limits: dict[str, int | None]
    options: dict[str, Value]
    seed: int | None
    threads: int | None


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
    limits = {name: read_limit(text, f"--context-{name}") for name, text in texts.items() if text is not None}
    if arguments.load is not None:
        _check_load(arguments)
    return Opening(
        name=SMALL_WORLD if shipped else Path(model).name or model,
        small_world=shipped,
        loading={
            "name": model,
            "adapter": adapter,
            "device": arguments.device or device_for(arguments.backend),
            "quiet": shipped,
            **{option: getattr(arguments, option) for option in ("dtype", "backend", "quantize", "attention")},
        },
        directory=arguments.load,
        settings={
            "system": None if arguments.system is None else without_surrogates(arguments.system),
            "template": {} if arguments.thinking is None else {"enable_thinking": arguments.thinking},
        },
        limits=limits,
        seed=options.pop("seed", None),
        options=options,
        threads=check_threads(arguments.threads),
    )


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


def open_chat(opening: Opening, screen: PlainScreen | TerminalScreen) -> Chat:
    """Load the model and make, or load, the session.

    Raises:
        ValueError, OSError, ImportError: see ``load_patched`` and ``MemorySession``.
    """
    from ..session import MemorySession  # transformers takes a while, and is not needed to parse arguments
    from .conversation import Chat, load_session

    model, tokenizer = load_patched(check_tokenizer=can_chat, **opening.loading)
    if opening.loading["adapter"] is None:
        logger.warning(
            "no --adapter: the memory's parameters are fresh and untrained; they disturb answers rather than remember "
            "(/off: without them)"
        )
    if opening.directory is None:
        session = MemorySession(model, tokenizer, context_turns=CONTEXT_TURNS, **opening.settings)
    else:
        session = load_session(opening.directory, model, tokenizer, "--load")
    session.limit_context(**(vars(session.limits) | opening.limits))
    session.generation = generation_with(session.generation, opening.options)
    chat = Chat(session, screen, small_world=opening.small_world, seed=opening.seed)
    if opening.directory is not None:
        chat.saved(opening.directory)
    return chat
