"""The commands of a chat: what begins with a slash."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..adapter.wrappers import unwrap
from ..display import counted, in_bytes, number, shortened, without_surrogates
from ..errors import ArgumentError, ConflictError
from ..inspection.pictures import Snapshot, heat_map_lines, snapshot
from ..memory.figures import LayerReport, norm_of
from ..recall import hints
from ..session.audit import MOST_SOURCE
from ..session.forgetting import places_of
from ..storage.files import as_path, read_bytes
from ..storage.snapshots import MANIFEST, SUFFIX
from ..text.answering import DEFAULT_NEW_TOKENS
from .conversation import Chat, load_session
from .options import OPTIONS, generation_with, read_limit, read_option, read_share, shown_options

OVERWRITE = "--overwrite"
MESSAGES = "--messages"
TRUST = "trust="
MOST_BYTES = 16_000_000  # of a file to read
MOST_DRAWN = 16  # states in a heat map, unless all are asked for
_BARS = {"ascii": "#-", "unicode": "█░", "colour": "█░"}
_SHOWN = 4  # messages after /load
_LONG = 400  # characters of each
_MOVES = 12  # rows of /audit
_CONTEXT = "nothing, a number of turns, all, tokens N, tokens all, or drop"


@dataclass(frozen=True)
class Command:
    """``run(chat, rest)``, where ``rest`` is what follows the name; ``arguments`` and ``help`` are for the reader."""

    run: Callable[[Chat, str], None]
    arguments: str
    help: str


def take_line(chat: Chat, text: str) -> bool:
    """Have a turn, or run a command. Whether it went well; what did not is told on the screen, and undone."""
    # What a terminal or a pipe could not decode is replaced: no tokenizer takes it.
    text = without_surrogates(text).strip()
    chat.draw_anew()
    try:
        if text.startswith("/") and not text.startswith("//"):
            run_command(chat, text)
        elif text:
            chat.say(text.removeprefix("/") if text.startswith("//") else text)
    except BrokenPipeError:
        raise
    except Exception as error:
        # Whatever it was, the conversation is as it was, and goes on.
        known = isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError)
        chat.screen.error(str(error) if known else f"{type(error).__name__}: {error}")
        return False
    return True


def run_command(chat: Chat, line: str) -> None:
    """Run the command that ``line`` begins with.

    Raises:
        ValueError: there is no such command, or one that takes nothing was given something; what is allowed is named.
    """
    name, *rest = line[1:].split(maxsplit=1)[:2] or [""]
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f" (did you mean /{near[0]}?)" if near else ""
        raise ArgumentError(f"/{name}: no such command{meant}; allowed {', '.join('/' + name for name in COMMANDS)}")
    rest = rest[0].strip() if rest else ""
    if rest and not command.arguments:
        raise ArgumentError(f"/{name}: got {rest!r:.80}, allowed nothing after it")
    if not rest and command.arguments and not command.arguments.startswith("["):
        raise ArgumentError(f"/{name}: got nothing after it, allowed /{name} {command.arguments}")
    command.run(chat, rest)


# --- the conversation


def _help(chat: Chat, rest: str) -> None:
    rows = [[f"/{name} {command.arguments}".rstrip(), command.help] for name, command in COMMANDS.items()]
    chat.screen.table(["command", ""], [*rows, ["//…", "say something that begins with a slash"]], left=(0, 1))
    chat.screen.say("A line that ends in \\ goes on in the next one.")
    if chat.small_world:
        chat.screen.say("\n" + hints.world_help(chat.random))


def _off(chat: Chat, rest: str) -> None:
    chat.session.remembers = False
    chat.screen.say("Memory off: the bare backbone answers; turns are not written. /on switches it on again.")


def _on(chat: Chat, rest: str) -> None:
    chat.session.remembers = True
    chat.screen.say("Memory on.")


def _undo(chat: Chat, rest: str) -> None:
    what = chat.undo()
    chat.screen.say(f"Undone: {what}; {counted(chat.session.turns, 'turn')} as before.")


def _reset(chat: Chat, rest: str) -> None:
    with chat.change("/reset"):
        chat.session = chat.session.anew()
    chat.screen.say("A new conversation, with an empty memory.")


def _set(chat: Chat, rest: str) -> None:
    if rest:
        name, *values = rest.split(maxsplit=1)
        value = read_option(name, "".join(values).strip(), f"/set {name}")
        if name == "seed":
            chat.set_seed(value)
        else:
            chat.session.generation = generation_with(chat.session.generation, {name: value})
    config = unwrap(chat.session.model).generation_config
    defaults = {"max_new_tokens": config.max_new_tokens or DEFAULT_NEW_TOKENS, "top_p": config.top_p}
    shown = shown_options(chat.session.generation, defaults, chat.seed)
    chat.screen.table(
        ["option", "value", ""], [[name, value, OPTIONS[name].help] for name, value in shown.items()], left=(0, 1, 2)
    )
    sampled = chat.session.generation.get("do_sample")
    chat.screen.say("Answers are sampled." if sampled else "Answers are greedy: the same each time.")


def _quit(chat: Chat, rest: str) -> None:
    chat.ended = True


# --- what is in sight


def _context(chat: Chat, rest: str) -> None:
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
        _limit(chat, chat.session.limits.turns, read_limit(words[1], "/context tokens"))
    elif len(words) == 1:
        _limit(chat, read_limit(rest, "/context", f"{_CONTEXT}, N 1 or more"), chat.session.limits.tokens)
    else:
        raise ArgumentError(f"/context: got {rest!r:.80}, allowed {_CONTEXT}")


def _limit(chat: Chat, turns: int | None, tokens: int | None) -> None:
    chat.session.limit_context(turns, tokens)
    chat.screen.say(f"From the next turn on: {limits(chat)}.")


def _drop(chat: Chat) -> None:
    count = chat.turns_in_context
    with chat.change("/context drop"):
        chat.session.drop_context()
    chat.screen.say(f"{counted(count, 'turn')} out of sight; what the memory holds of them stays.")


def _show(chat: Chat) -> None:
    session = chat.session
    now = session.snapshot().now
    first = session.turns - len(now.turns) + 1
    most = max(8, (chat.screen.columns - 20) // 2)  # two texts beside the figures
    system = session.system or "(what the template puts in front)"
    rows = [["-", str(len(now.preamble)), shortened(system, most), ""]] if now.preamble.ids else []
    for place, turn in enumerate(now.turns, first):
        texts = (shortened(turn.messages[end].get("content") or "", most) for end in (0, -1))
        rows.append([str(place), str(len(turn)), *texts])
    if rows:
        chat.screen.table(["turn", "tokens", "said", "answered"], rows, left=(2, 3))
    gone = first - 1
    away = f"; {counted(gone, 'earlier turn')} left to the memory" if gone else ""
    chat.screen.say(f"In sight: {summary(chat)}{away}. Allowed: {limits(chat)}.")


def summary(chat: Chat) -> str:
    """How much is in sight."""
    return f"{counted(chat.turns_in_context, 'turn')}, {counted(chat.session.context_tokens, 'token')}"


def limits(chat: Chat) -> str:
    """How much may be in sight, in words."""
    turns, tokens = chat.session.limits.turns, chat.session.limits.tokens
    parts = [] if turns is None else [f"{counted(turns, 'turn')} (the one being answered included)"]
    parts += [] if tokens is None else [f"{tokens:,} tokens of a prompt"]
    return " and ".join(parts) or "everything"


# --- files


def _save(chat: Chat, rest: str) -> None:
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


def _load(chat: Chat, rest: str) -> None:
    """Go on with the session in the directory ``rest``.

    Raises:
        ValueError, OSError: there is none, or not one of this model and adapter.
    """
    with chat.change("/load"):
        chat.session = load_session(rest, chat.session.model, chat.session.tokenizer, **chat.trust)
    chat.saved(rest)
    show_loaded(chat)


def show_loaded(chat: Chat) -> None:
    """What was loaded, and its last messages."""
    session = chat.session
    off = "" if session.remembers else "; memory off"
    chat.screen.say(f"Loaded {chat.directory}: {counted(session.turns, 'turn')}, in sight {summary(chat)}{off}.")
    for message in session.messages[-_SHOWN:]:
        text = str(message.get("content") or "")
        chat.screen.said(message["role"], text if len(text) <= _LONG else text[:_LONG].rstrip() + " …")


# --- the memory by itself


def _memory(chat: Chat, rest: str) -> None:
    """Figures of every layer, and a heat map: of the layers that hold most, or of ``all``.

    Raises:
        ValueError: ``rest`` is something else.
    """
    if rest not in ("", "all"):
        raise ArgumentError(f"/memory: got {rest!r:.80}, allowed nothing or all")
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


def _ask(chat: Chat, rest: str) -> None:
    """An answer from the memory alone."""
    with chat.screen.answering() as answer:
        answer.piece(chat.session.retrieve(rest))


def _revise(chat: Chat, rest: str) -> None:
    """Write what holds from now on."""
    with chat.change("/revise", rest):
        tokens = chat.session.revise(rest)
    stale = " The context still shows what was said before; /context drop empties it." if chat.session.context else ""
    chat.screen.say(f"Written over what the memory held of it: {counted(tokens, 'token')}.{stale}")


def _forget(chat: Chat, rest: str) -> None:
    """Erase a text from the memory, with ``--messages`` in front from the messages too; say where it still stands."""
    flag, _, text = rest.partition(" ")
    messages = flag == MESSAGES and bool(text.strip())
    rest = text.strip() if messages else rest
    before = norm_of(chat.session.memory)
    with chat.change("/forget", rest):
        told = chat.session.forget(rest, messages=messages)
    after = norm_of(chat.session.memory)
    left = f"{after / before:.0%} of the state's norm is left" if before else "the memory was empty"
    lines = [f"Erased, as far as it is told from others: {left}."]
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


def _ingest(chat: Chat, rest: str) -> None:
    """Read a text file into the memory, with ``trust=X`` in front this share of the way (./trust=… is a file).

    Raises:
        ValueError, OSError: it is none, too large, or not UTF-8.
    """
    trust = 1.0
    if rest.startswith(TRUST):
        told, *name = rest.split(maxsplit=1)
        if not name:
            raise ArgumentError(f"/ingest: got {rest!r:.80} without a file, allowed /ingest {TRUST}X FILE")
        trust, rest = read_share(told.removeprefix(TRUST), "/ingest trust"), name[0]
    text = read_text(rest)
    source = "".join(letter if letter.isprintable() else "?" for letter in as_path(rest, "/ingest").name)
    with chat.change("/ingest", rest):
        tokens = chat.session.ingest(text, source=source[:MOST_SOURCE], trust=trust)
    chat.screen.say(
        f"Read {rest} into the memory: {counted(tokens, 'token')}, {in_bytes(len(text.encode()))}; it was moved by "
        f"{tokens.moved:.2f}."
    )


def _audit(chat: Chat, rest: str) -> None:
    """What moved the memory how far: the newest, or the ``largest``.

    Raises:
        ValueError: ``rest`` is something else.
    """
    if rest not in ("", "largest"):
        raise ArgumentError(f"/audit: got {rest!r:.80}, allowed nothing or largest")
    audit = chat.session.audit()
    chat.screen.say(str(audit.largest(_MOVES) if rest else audit.newest(_MOVES)))
    chat.screen.say("Moved: 0 nothing, 1 all of it is new, 2 turned round.")


def read_text(name: str) -> str:
    """The text of a file, which must be UTF-8 and of at most ``MOST_BYTES``."""
    data = read_bytes(as_path(name, "/ingest"), "/ingest", most=MOST_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"/ingest: {name}: not UTF-8 (byte {error.start}); convert it first") from error
    if not text.strip():
        raise ArgumentError(f"/ingest: {name}: nothing but white space")
    return text


# --- all of them

COMMANDS = {
    "help": Command(_help, "", "what can be typed"),
    "save": Command(_save, "[DIR]", "write conversation, context and memory into a directory"),
    "load": Command(_load, "DIR", "go on with what was saved there"),
    "memory": Command(_memory, "[all]", "what the memory holds, layer by layer"),
    "ask": Command(_ask, "TEXT", "an answer from the memory alone; nothing is written"),
    "revise": Command(_revise, "TEXT", "write what holds from now on; no answer"),
    "forget": Command(_forget, "TEXT", "erase what was said from the memory (--messages TEXT: from the messages, too)"),
    "ingest": Command(_ingest, "FILE", f"read a text file into the memory ({TRUST}X FILE: that share of the way)"),
    "audit": Command(_audit, "[largest]", "what moved the memory how far"),
    "context": Command(_context, "[N | all | tokens N | drop]", "what is in sight; its limits; empty it"),
    "off": Command(_off, "", "the bare backbone answers, without memory"),
    "on": Command(_on, "", "the memory is read and written again"),
    "undo": Command(_undo, "", "take back the last turn, or what a command changed"),
    "reset": Command(_reset, "", "a new conversation with an empty memory"),
    "set": Command(_set, "[NAME VALUE]", f"options of the answers: {', '.join(OPTIONS)}"),
    "quit": Command(_quit, "", "the end (Ctrl-D)"),
}
