"""What a session's manifest must look like, field by field; whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arguments import shown
from ..text.encode import is_text_part
from ..text.settings import Error, check_generation, check_json, check_template

_FIELDS = ("identity", "settings", "messages", "context", "frozen")
_SETTINGS = ("system", "context_turns", "context_tokens", "template", "generation", "remembers")
_CONTEXT = ("preamble", "written", "turns", "cache")
_ROLES = ("assistant", "tool", "user")


def check_content(content: Mapping[str, Any], where: str, vocabulary: int, segmented: bool, error: Error) -> None:
    """Raise ``error``, naming the field, unless ``content`` (JSON) is what ``saving.contents`` makes.

    Args:
        where: the file, or the argument, that the message begins with.
        vocabulary: token ids are below it.
        segmented: the adapter writes segments (SSW), which the blocks then have.
    """
    check = _Check(where, error)
    check.fields(content, "", _FIELDS)
    check_identity(content["identity"], where, error)
    _check_settings(check, content["settings"], vocabulary)
    messages = content["messages"]
    check.that(isinstance(messages, list), "messages", messages, "a list")
    for place, message in enumerate(messages):
        _check_message(check, f"messages[{place}]", message)
    context, frozen = content["context"], content["frozen"]
    _check_context(check, context, vocabulary, segmented)
    flags = isinstance(frozen, list) and all(type(flag) is bool for flag in frozen)
    check.that(flags, "frozen", frozen, "a list of true and false")
    check.that(
        len(frozen) == len(context["turns"]) + 1, "frozen", f"{len(frozen)} entries", "one a turn, and one for now"
    )
    end = len(messages)
    for place in reversed(range(len(context["turns"]))):
        said = context["turns"][place]["messages"]
        begin = _last(messages, said, end)
        check.that(begin is not None, f"context.turns[{place}]", "messages", "those of the conversation, in order")
        end = begin


def check_identity(identity: Any, where: str, error: Error) -> None:
    """Raise ``error`` unless ``identity`` is an object of texts, as ``Identity.fingerprints`` makes it."""
    texts = isinstance(identity, dict) and all(isinstance(value, str) for value in identity.values())
    _Check(where, error).that(texts, "identity", identity, "an object of texts")


class _Check:
    def __init__(self, where: str, error: Error):
        self.where, self.error = where, error

    def that(self, holds: bool, field: str, value: Any, allowed: str) -> None:
        if not holds:
            raise self.error(f"{self.where}: {field}: got {shown(value)}, allowed {allowed}")

    def fields(self, value: Any, field: str, names: tuple[str, ...]) -> None:
        """An object with these fields and no others."""
        found = sorted(map(shown, value)) if isinstance(value, Mapping) else type(value).__name__
        allowed = f"an object of {', '.join(names)}"
        self.that(isinstance(value, Mapping) and value.keys() == set(names), field or "content", found, allowed)


def _check_settings(check: _Check, settings: Any, vocabulary: int) -> None:
    check.fields(settings, "settings", _SETTINGS)
    system = settings["system"]
    whole = system is None or (isinstance(system, str) and system.encode("utf-8", "replace").decode() == system)
    check.that(whole, "settings.system", system, "a text, without half a surrogate pair, or null")
    for name in ("context_turns", "context_tokens"):
        value = settings[name]
        whole = value is None or (type(value) is int and 1 <= value < 2**63)
        check.that(whole, f"settings.{name}", value, "an integer, 1 or more, or null")
    for name in ("template", "generation"):
        check.that(isinstance(settings[name], dict), f"settings.{name}", settings[name], "an object")
    check_template(settings["template"], f"{check.where}: settings.template", check.error)
    check_generation(settings["generation"], f"{check.where}: settings.generation", vocabulary, check.error)
    check.that(type(settings["remembers"]) is bool, "settings.remembers", settings["remembers"], "true or false")


def _check_message(check: _Check, field: str, message: Any) -> None:
    check.that(isinstance(message, dict), field, message, "an object")
    role, content, thought = (message.get(name) for name in ("role", "content", "reasoning_content"))
    check.that(role in _ROLES if isinstance(role, str) else False, f"{field}.role", role, ", ".join(_ROLES))
    parts = isinstance(content, list) and all(map(is_text_part, content))
    check.that(
        content is None or isinstance(content, str) or parts, f"{field}.content", content, "a text or a list of texts"
    )
    check.that(thought is None or isinstance(thought, str), f"{field}.reasoning_content", thought, "a text")
    check_json(message, f"{check.where}: {field}", check.error)


def _check_context(check: _Check, context: Any, vocabulary: int, segmented: bool) -> None:
    check.fields(context, "context", _CONTEXT)
    _check_block(check, "context.preamble", context["preamble"], vocabulary, segmented)
    check.that(type(context["written"]) is bool, "context.written", context["written"], "true or false")
    turns, layers = context["turns"], context["cache"]
    check.that(isinstance(turns, list), "context.turns", turns, "a list")
    length = len(context["preamble"]["ids"])
    for place, turn in enumerate(turns):
        length += _check_turn(check, f"context.turns[{place}]", turn, vocabulary, segmented)
    check.that(layers is None or isinstance(layers, list), "context.cache", layers, "a list or null")
    for place, layer in enumerate(layers or ()):
        field = f"context.cache[{place}]"
        check.fields(layer, field, ("filled", "length", "window"))
        check.that(type(layer["filled"]) is bool, f"{field}.filled", layer["filled"], "true or false")
        window = layer["window"]
        check.that(
            window is None or (type(window) is int and window > 0), f"{field}.window", window, "an integer or null"
        )
        wanted = length if layer["filled"] else 0
        held = type(layer["length"]) is int and layer["length"] == wanted
        check.that(held, f"{field}.length", layer["length"], f"{wanted}, the tokens in the context")


def _check_turn(check: _Check, field: str, turn: Any, vocabulary: int, segmented: bool) -> int:
    """How many tokens the turn has."""
    check.fields(turn, field, ("messages", "prompt", "answer"))
    messages, prompt = turn["messages"], turn["prompt"]
    check.that(isinstance(messages, list) and len(messages) > 1, f"{field}.messages", messages, "two messages or more")
    for place, message in enumerate(messages):
        _check_message(check, f"{field}.messages[{place}]", message)
        last = place == len(messages) - 1
        role = message["role"]
        allowed = "assistant" if last else "user, tool"
        check.that((role == "assistant") == last, f"{field}.messages[{place}].role", role, allowed)
    blocks = isinstance(prompt, list) and len(prompt) == len(messages) - 1
    check.that(blocks, f"{field}.prompt", prompt, "a block for each message but the last")
    for place, block in enumerate(prompt):
        _check_block(check, f"{field}.prompt[{place}]", block, vocabulary, segmented)
    _check_block(check, f"{field}.answer", turn["answer"], vocabulary, segmented)
    return sum(len(block["ids"]) for block in (*prompt, turn["answer"]))


def _check_block(check: _Check, field: str, block: Any, vocabulary: int, segmented: bool) -> None:
    check.fields(block, field, ("ids", "segments"))
    ids, segments = block["ids"], block["segments"]
    check.that(isinstance(ids, list), f"{field}.ids", ids, "a list")
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < vocabulary]
    check.that(not wrong, f"{field}.ids", wrong[:1], f"integers from 0 to {vocabulary - 1}")
    if segments is None:
        check.that(not segmented or not ids, f"{field}.segments", None, "a segment for each token")
        return
    check.that(segmented, f"{field}.segments", segments, "null: this adapter writes every token")
    fits = isinstance(segments, list) and len(segments) == len(ids)
    fits = fits and all(type(segment) is int and -1 <= segment < len(ids) for segment in segments)
    check.that(fits, f"{field}.segments", segments, "-1 or a segment's number for each token")


def _last(messages: list, part: list, end: int) -> int | None:
    """Where ``part`` stands for the last time in ``messages[:end]``."""
    places = range(end - len(part), -1, -1)
    return next((place for place in places if messages[place : place + len(part)] == part), None)
