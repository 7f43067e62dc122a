"""``/memory``, ``/ask``, ``/revise``, ``/forget``, ``/ingest``: the memory by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..display import number
from ..errors import ArgumentError, FileMissingError
from ..inspection.pictures import Snapshot, heat_map_lines, snapshot
from ..memory.state import MemoryState
from ..session.forgetting import places_of
from ..storage.files import as_path
from .wording import counted, in_bytes

if TYPE_CHECKING:
    from ..memory.figures import LayerReport
    from .conversation import Chat

MOST_BYTES = 16_000_000  # of a file to read
MESSAGES = "--messages"
MOST_DRAWN = 16  # states in a heat map, unless all are asked for
_BARS = {"ascii": "#-", "unicode": "█░", "colour": "█░"}


def memory(chat: Chat, rest: str) -> None:
    """Figures of every layer, and a heat map: of the layers that hold most, or of ``all``.

    Raises:
        ValueError: ``rest`` is something else.
    """
    if rest not in ("", "all"):
        raise ArgumentError(f"/memory: got {rest!r}, allowed nothing or all")
    state, screen = chat.session.memory, chat.screen
    rows: dict[int, list[LayerReport]] = {}
    for row in state.report():
        rows.setdefault(row.layer, []).append(row)
    heads = len(next(iter(rows.values())))
    rank = "effective rank" if heads == 1 else f"effective rank (mean of {heads})"
    cells = [_figures(layer, found, state[layer].shape[-1], screen.style) for layer, found in rows.items()]
    screen.table(["layer", "norm", rank, "", "skipped"], cells)
    drawn = snapshot(state, "now")
    if rest != "all" and len(rows) * heads > MOST_DRAWN:
        norms = {layer: math.hypot(*(row.norm for row in found)) for layer, found in rows.items()}
        most = sorted(norms, key=norms.get, reverse=True)[: max(1, MOST_DRAWN // heads)]
        drawn = Snapshot(drawn.name, {layer: drawn.states[layer] for layer in sorted(most)})
    screen.picture(heat_map_lines([drawn], screen.style, screen.columns))
    left_out = f"; drawn are the {len(drawn.states)} layers that hold most (/memory all)"
    size = sum(layer.numel() * layer.element_size() for _, layer in state.items())
    off = " It is off: turns neither read nor write it (/on)." if not chat.session.remembers else ""
    screen.say(f"{in_bytes(size)}, norm {norm_of(state):.3g}{left_out if len(drawn.states) < len(rows) else ''}.{off}")


def _figures(layer: int, heads: Sequence[LayerReport], rank: int, style: str) -> list[str]:
    norm = math.hypot(*(row.norm for row in heads))
    effective = sum(row.effective_rank for row in heads) / len(heads)
    filled = 0 if math.isnan(effective) else round(effective)
    full, empty = _BARS[style]
    bar = full * filled + empty * (rank - filled)
    return [str(layer), number(norm), f"{effective:.1f} of {rank}", bar, str(sum(row.skipped for row in heads))]


def ask(chat: Chat, rest: str) -> None:
    """An answer from the memory alone."""
    with chat.screen.answering() as answer:
        answer.piece(chat.session.retrieve(rest))


def revise(chat: Chat, rest: str) -> None:
    """Write what holds from now on."""
    with chat.change("/revise", rest):
        tokens = chat.session.revise(rest)
    chat.screen.say(f"Written over what the memory held of it: {counted(tokens, 'token')}.{_stale(chat)}")


def _stale(chat: Chat) -> str:
    return " The context still shows what was said before; /context drop empties it." if chat.session.context else ""


def forget(chat: Chat, rest: str) -> None:
    """Erase a text from the memory, with ``--messages`` in front from the messages too; say where it still stands."""
    flag, _, text = rest.partition(" ")
    messages = flag == MESSAGES and bool(text.strip())
    rest = text.strip() if messages else rest
    before = norm_of(chat.session.memory)
    with chat.change("/forget", rest):
        told = chat.session.forget(rest, messages=messages)
    after = norm_of(chat.session.memory)
    left = f"{after / before:.0%} of the state's norm is left" if before else "the memory was empty"
    lines = [f"Erased where its keys point to: {left}."]
    session = chat.session
    if messages:
        gone = f"; {counted(told.turns, 'turn')} left the context" if told.turns else ""
        lines.append(f"Taken out of {counted(told.messages, 'message')}{gone}.")
    if places_of({"system": session.system, "context": session.context}, rest):
        lines.append("Its words are still in sight, in the context: they leave it by /context drop.")
    if places_of({"messages": session.messages}, rest):
        more = "" if messages else f"; /forget {MESSAGES} TEXT takes the text out"
        lines.append(f"The record of the conversation keeps them, and /save writes it{more}.")
    if messages and chat.history is not None:
        lines.append(f"What was typed stays in {chat.history}, this line too.")
    chat.screen.say("\n".join(lines))


def ingest(chat: Chat, rest: str) -> None:
    """Read a text file into the memory.

    Raises:
        ValueError, OSError: it is none, too large, or not UTF-8.
    """
    text = read_text(rest)
    with chat.change("/ingest", rest):
        tokens = chat.session.ingest(text)
    chat.screen.say(f"Read {rest} into the memory: {counted(tokens, 'token')}, {in_bytes(len(text.encode()))}.")


def read_text(name: str) -> str:
    """The text of a file, which must be UTF-8 and of at most ``MOST_BYTES``."""
    path = as_path(name, "/ingest")
    if not path.exists():
        raise FileMissingError(f"/ingest: {name}: no such file")
    if not path.is_file():
        raise ArgumentError(f"/ingest: {name}: not a file")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ArgumentError(f"/ingest: {name}: {in_bytes(size)}, allowed up to {in_bytes(MOST_BYTES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"/ingest: {name}: not UTF-8 (byte {error.start}); convert it first") from error
    if not text.strip():
        raise ArgumentError(f"/ingest: {name}: nothing but white space")
    return text


def norm_of(state: MemoryState) -> float:
    """The Frobenius norm of all layers together."""
    return math.sqrt(sum(float(layer.detach().double().square().sum()) for _, layer in state.items()))
