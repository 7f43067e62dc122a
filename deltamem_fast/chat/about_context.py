"""``/context``: which turns are in sight, and how many may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ArgumentError
from .wording import counted, shortened

if TYPE_CHECKING:
    from .conversation import Chat

_ALLOWED = "nothing, a number of turns, all, tokens N, tokens all, or drop"


def context(chat: Chat, rest: str) -> None:
    """Show the context, set its limits, or empty it.

    Raises:
        ValueError: ``rest`` is none of that.
    """
    words = rest.split()
    if words == ["drop"]:
        _drop(chat)
    elif not words:
        _show(chat)
    elif words[0] == "tokens" and len(words) == 2:
        _limit(chat, chat.session.limits.turns, _number(rest, words[1]))
    elif len(words) == 1:
        _limit(chat, _number(rest, words[0]), chat.session.limits.tokens)
    else:
        raise ArgumentError(f"/context: got {rest!r}, allowed {_ALLOWED}")


def _number(rest: str, text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentError(f"/context: got {rest!r}, allowed {_ALLOWED}, N 1 or more")
    return int(text)


def _limit(chat: Chat, turns: int | None, tokens: int | None) -> None:
    chat.session.limit_context(turns, tokens)
    chat.screen.say(f"From the next turn on: {limits(chat)}.")


def _drop(chat: Chat) -> None:
    count = turns_in_context(chat)
    with chat.change("/context drop"):
        chat.session.drop_context()
    chat.screen.say(f"{counted(count, 'turn')} out of sight; what the memory holds of them stays.")


def _show(chat: Chat) -> None:
    session = chat.session
    now = session._now
    first = session.turns - len(now.turns) + 1
    most = max(8, (chat.screen.columns - 20) // 2)  # two texts beside the figures
    rows = [["-", str(len(now.preamble)), shortened(_preamble(chat), most), ""]] if now.preamble.ids else []
    for number, turn in enumerate(now.turns, first):
        texts = (shortened(turn.messages[place].get("content") or "", most) for place in (0, -1))
        rows.append([str(number), str(len(turn)), *texts])
    if rows:
        chat.screen.table(["turn", "tokens", "said", "answered"], rows, left=(2, 3))
    gone = first - 1
    away = f"; {counted(gone, 'earlier turn')} left to the memory" if gone else ""
    chat.screen.say(f"In sight: {summary(chat)}{away}. Allowed: {limits(chat)}.")


def _preamble(chat: Chat) -> str:
    return chat.session.system or "(what the template puts in front)"


def turns_in_context(chat: Chat) -> int:
    """How many turns are in sight."""
    return sum(message["role"] == "assistant" for message in chat.session.context)


def summary(chat: Chat) -> str:
    """How much is in sight."""
    return f"{counted(turns_in_context(chat), 'turn')}, {counted(chat.session.context_tokens, 'token')}"


def limits(chat: Chat) -> str:
    """How much may be in sight, in words."""
    turns, tokens = chat.session.limits.turns, chat.session.limits.tokens
    parts = [] if turns is None else [f"{counted(turns, 'turn')} (the one being answered included)"]
    parts += [] if tokens is None else [f"{tokens:,} tokens of a prompt"]
    return " and ".join(parts) or "everything"
