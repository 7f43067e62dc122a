"""``/save`` and ``/load``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ArgumentError, ConflictError
from ..session import MemorySession
from ..storage.files import as_path
from ..storage.snapshots import MANIFEST, SUFFIX
from .about_context import summary
from .options import generation_with
from .wording import counted, in_bytes

if TYPE_CHECKING:
    from .conversation import Chat

OVERWRITE = "--overwrite"
_SHOWN = 4  # messages after /load
_LONG = 400  # characters of each


def save(chat: Chat, rest: str) -> None:
    """Write the session into the directory ``rest``; without one, where it was last, or into a new one.

    ``--overwrite`` in front: also over a session that this chat has neither loaded nor saved.

    Raises:
        ValueError, OSError: it cannot be written there, or other things lie there.
        ConflictError: another session lies there.
    """
    overwrite = rest.split(maxsplit=1)[:1] == [OVERWRITE]
    rest = rest.removeprefix(OVERWRITE).strip() if overwrite else rest
    name = rest or chat.directory or time.strftime("deltamem-chat-%Y%m%d-%H%M%S")
    directory = as_path(name, "/save")
    earlier = (directory / MANIFEST).exists()
    if directory.is_dir() and not earlier and any(directory.iterdir()):
        raise ArgumentError(f"/save: {name} is not empty and holds no session; allowed a new or empty directory")
    try:
        chat.session.save(directory, overwrite=overwrite)
    except ConflictError as error:
        raise ConflictError(
            f"/save: {name} holds another session, saved elsewhere; allowed another directory, or /save {OVERWRITE} "
            f"{name} to replace it"
        ) from error
    chat.saved(name)
    written = [directory / MANIFEST, *sorted(directory.glob(f"*{SUFFIX}"))]
    size = in_bytes(sum(path.stat().st_size for path in written))
    instead = ", in place of what was there" if earlier else ""
    chat.screen.say(
        f"Saved {counted(chat.session.turns, 'turn')}, context and memory to {name} "
        f"({', '.join(path.name for path in written)}; {size}){instead}."
    )


def load(chat: Chat, rest: str) -> None:
    """Go on with the session in the directory ``rest``.

    Raises:
        ValueError, OSError: there is none, or not one of this model and adapter.
    """
    with chat.change("/load"):
        chat.session = load_session(rest, chat.session.model, chat.session.tokenizer)
    chat.saved(rest)
    show_loaded(chat)


def load_session(name: str, model: nn.Module, tokenizer, argument: str = "/load") -> MemorySession:
    """The session in the directory ``name``; greedy if it does not say otherwise, as every chat."""
    session = MemorySession.load(as_path(name, argument), model, tokenizer)
    session.generation = generation_with(session.generation, {})
    return session


def show_loaded(chat: Chat) -> None:
    """What was loaded, and its last messages."""
    session = chat.session
    off = "" if session.remembers else "; memory off"
    chat.screen.say(f"Loaded {chat.directory}: {counted(session.turns, 'turn')}, in sight {summary(chat)}{off}.")
    for message in session.messages[-_SHOWN:]:
        text = str(message.get("content") or "")
        chat.screen.said(message["role"], text if len(text) <= _LONG else text[:_LONG].rstrip() + " …")
