"""What a session's manifest must look like, field by field; whoever wrote it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..arguments import shown
from ..text.messages import is_text_part
from ..text.settings import Error, check_generation, check_json, check_template
from .audit import KEPT, MOST_SOURCE, ROLES

_FIELDS = ("identity", "settings", "messages", "context", "frozen")
_SETTINGS = ("system", "context_turns", "context_tokens", "template", "generation", "remembers")
_NEWER_SETTINGS = ("trust", "budget", "history")
_CONTEXT = ("preamble", "written", "turns", "cache")
_ROLES = ("assistant", "tool", "user")


def check_content(content: Mapping[str, Any], where: str, vocabulary: int, segmented: bool, error: Error) -> None:
    """Raise ``error``, naming the field, unless ``content`` (JSON) is what ``saving.contents`` makes.

    Args:
        where: the file, or the argument, that the message begins with.
        vocabulary: token ids are below it.
        segmented: the adapter writes segments (SSW), which the blocks then have.
    """
    check = _Check(where, error, vocabulary, segmented)
    check.fields(content, "", _FIELDS, ("audit",))
    check.audit(content.get("audit", {"moves": [], "dropped": 0}))
    check_identity(content["identity"], where, error)
    check.settings(content["settings"])
    messages, context, frozen = content["messages"], content["context"], content["frozen"]
    check.each(check.message, messages, "messages")
    check.context(context)
    flags = isinstance(frozen, list) and all(type(flag) is bool for flag in frozen)
    check.that(flags, "frozen", frozen, "a list of true and false")
    turns, count = context["turns"], len(frozen)
    check.that(count == len(turns) + 1, "frozen", f"{count} entries", "one a turn, and one for now")
    end = len(messages)
    for place, turn in reversed(list(enumerate(turns))):
        end = _last(messages, turn["messages"], end)
        check.that(end is not None, f"context.turns[{place}]", "messages", "those of the conversation, in order")


def check_identity(identity: Any, where: str, error: Error) -> None:
    """Raise ``error`` unless ``identity`` is an object of texts, as ``Identity.fingerprints`` makes it."""
    texts = isinstance(identity, dict) and all(isinstance(value, str) for value in identity.values())
    _Check(where, error).that(texts, "identity", identity, "an object of texts")


class _Check:
    """Checks of a manifest's parts; each raises ``error``, naming the file and the field, unless its part is whole."""

    def __init__(self, where: str, error: Error, vocabulary: int = 0, segmented: bool = False):
        self.where, self.error, self.vocabulary, self.segmented = where, error, vocabulary, segmented

    def that(self, holds: bool, field: str, value: Any, allowed: str) -> None:
        if not holds:
            raise self.error(f"{self.where}: {field}: got {shown(value)}, allowed {allowed}")

    def fields(self, value: Any, field: str, names: tuple[str, ...], more: tuple[str, ...] = ()) -> None:
        """An object with these fields, of ``more`` all or some (files of versions before have none), and no others."""
        found = sorted(map(shown, value)) if isinstance(value, Mapping) else type(value).__name__
        allowed = f"an object of {', '.join(names)}" + (f" (and {', '.join(more)})" if more else "")
        whole = isinstance(value, Mapping) and set(names) <= value.keys() <= {*names, *more}
        self.that(whole, field or "content", found, allowed)

    def flag(self, value: Any, field: str) -> None:
        self.that(type(value) is bool, field, value, "true or false")

    def each(self, check: Callable[[Any, str], None], values: Any, field: str) -> None:
        """A list, each of whose entries ``check`` is given, with its place."""
        self.that(isinstance(values, list), field, values, "a list")
        for place, value in enumerate(values):
            check(value, f"{field}[{place}]")

    def settings(self, settings: Any) -> None:
        self.fields(settings, "settings", _SETTINGS, _NEWER_SETTINGS)
        trust, history = settings.get("trust", {}), settings.get("history", 0)
        roles = isinstance(trust, dict) and all(role in ROLES and _is_share(share) for role, share in trust.items())
        self.that(roles, "settings.trust", trust, f"an object of {', '.join(ROLES)} to numbers from 0 to 1")
        self.budget(settings.get("budget"), "settings.budget")
        whole = type(history) is int and 0 <= history < 2**31
        self.that(whole, "settings.history", history, "an integer, 0 or more")
        system = settings["system"]
        whole = system is None or (isinstance(system, str) and system.encode("utf-8", "replace").decode() == system)
        self.that(whole, "settings.system", system, "a text, without half a surrogate pair, or null")
        for name in ("context_turns", "context_tokens"):
            value = settings[name]
            whole = value is None or (type(value) is int and 1 <= value < 2**63)
            self.that(whole, f"settings.{name}", value, "an integer, 1 or more, or null")
        for name in ("template", "generation"):
            self.that(isinstance(settings[name], dict), f"settings.{name}", settings[name], "an object")
        check_template(settings["template"], f"{self.where}: settings.template", self.error)
        check_generation(settings["generation"], f"{self.where}: settings.generation", self.vocabulary, self.error)
        self.flag(settings["remembers"], "settings.remembers")

    def budget(self, value: Any, field: str) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
        self.that(value is None or number, field, value, "a number more than 0, or null")

    def audit(self, audit: Any) -> None:
        self.fields(audit, "audit", ("moves", "dropped"))
        moves, dropped = audit["moves"], audit["dropped"]
        self.that(type(dropped) is int and 0 <= dropped < 2**63, "audit.dropped", dropped, "an integer, 0 or more")
        self.that(isinstance(moves, list) and len(moves) <= KEPT, "audit.moves", moves, f"a list of {KEPT} at most")
        for place, move in enumerate(moves):
            self.that(_is_move(move), f"audit.moves[{place}]", move, "turn, source, message, tokens, trust, moved")

    def message(self, message: Any, field: str) -> None:
        self.that(isinstance(message, dict), field, message, "an object")
        role, content, thought = (message.get(name) for name in ("role", "content", "reasoning_content"))
        self.that(isinstance(role, str) and role in _ROLES, f"{field}.role", role, ", ".join(_ROLES))
        parts = isinstance(content, list) and all(map(is_text_part, content))
        texts = content is None or isinstance(content, str) or parts
        self.that(texts, f"{field}.content", content, "a text or a list of texts")
        self.that(thought is None or isinstance(thought, str), f"{field}.reasoning_content", thought, "a text")
        check_json(message, f"{self.where}: {field}", self.error)

    def context(self, context: Any) -> None:
        self.fields(context, "context", _CONTEXT)
        preamble, turns, layers = context["preamble"], context["turns"], context["cache"]
        self.block(preamble, "context.preamble")
        self.flag(context["written"], "context.written")
        self.each(self.turn, turns, "context.turns")
        blocks = [preamble, *(block for turn in turns for block in (*turn["prompt"], turn["answer"]))]
        length = sum(len(block["ids"]) for block in blocks)
        self.that(layers is None or isinstance(layers, list), "context.cache", layers, "a list or null")
        for place, layer in enumerate(layers or ()):
            self.layer(layer, f"context.cache[{place}]", length)

    def turn(self, turn: Any, field: str) -> None:
        self.fields(turn, field, ("messages", "prompt", "answer"))
        messages, prompt = turn["messages"], turn["prompt"]
        more = isinstance(messages, list) and len(messages) > 1
        self.that(more, f"{field}.messages", messages, "two messages or more")
        for place, message in enumerate(messages):
            self.message(message, f"{field}.messages[{place}]")
            role, last = message["role"], place == len(messages) - 1
            allowed = "assistant" if last else "user, tool"
            self.that((role == "assistant") == last, f"{field}.messages[{place}].role", role, allowed)
        blocks = isinstance(prompt, list) and len(prompt) == len(messages) - 1
        self.that(blocks, f"{field}.prompt", prompt, "a block for each message but the last")
        self.each(self.block, prompt, f"{field}.prompt")
        self.block(turn["answer"], f"{field}.answer")

    def block(self, block: Any, field: str) -> None:
        self.fields(block, field, ("ids", "segments"), ("trust", "budget"))
        self.that(_is_share(block.get("trust", 1.0)), f"{field}.trust", block.get("trust"), "a number from 0 to 1")
        self.budget(block.get("budget"), f"{field}.budget")
        ids, segments = block["ids"], block["segments"]
        self.that(isinstance(ids, list), f"{field}.ids", ids, "a list")
        wrong = [i for i in ids if type(i) is not int or not 0 <= i < self.vocabulary]
        self.that(not wrong, f"{field}.ids", wrong[:1], f"integers from 0 to {self.vocabulary - 1}")
        if segments is None:
            self.that(not self.segmented or not ids, f"{field}.segments", None, "a segment for each token")
            return
        self.that(self.segmented, f"{field}.segments", segments, "null: this adapter writes every token")
        fits = isinstance(segments, list) and len(segments) == len(ids)
        fits = fits and all(type(segment) is int and -1 <= segment < len(ids) for segment in segments)
        self.that(fits, f"{field}.segments", segments, "-1 or a segment's number for each token")

    def layer(self, layer: Any, field: str, tokens: int) -> None:
        """A layer of the cache, which holds the context's tokens if it is filled."""
        self.fields(layer, field, ("filled", "length", "window"))
        self.flag(layer["filled"], f"{field}.filled")
        window, length, wanted = layer["window"], layer["length"], tokens if layer["filled"] else 0
        whole = window is None or (type(window) is int and window > 0)
        self.that(whole, f"{field}.window", window, "an integer or null")
        held = type(length) is int and length == wanted
        self.that(held, f"{field}.length", length, f"{wanted}, the tokens in the context")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_move(move: Any) -> bool:
    """Whether it is what ``Audit.to_dict`` gives of a ``Move``."""
    if not isinstance(move, list) or len(move) != 6:
        return False
    turn, source, message, tokens, trust, moved = move
    counts = all(type(n) is int and 0 <= n < 2**63 for n in (turn, tokens, 0 if message is None else message))
    name = isinstance(source, str) and source.isprintable() and len(source) <= MOST_SOURCE + 10
    return counts and name and _is_share(trust) and type(moved) in (int, float) and 0 <= moved <= 2.001


def _last(messages: list, part: list, end: int) -> int | None:
    """Where ``part`` stands for the last time in ``messages[:end]``."""
    places = range(end - len(part), -1, -1)
    return next((place for place in places if messages[place : place + len(part)] == part), None)
