"""What a chat is asked for: arguments of ``deltamem chat``, and options of its answers, which ``/set`` changes, too."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.shipped import SHIPPED
from ..arguments import check_share
from ..display import without_surrogates
from ..errors import ArgumentError, FileMissingError
from ..memory.trusting import check_trust
from ..model.known import default_adapter, is_known
from ..model.loading import device_for
from ..model.threads import check_threads
from ..recall.weights import find_weights
from ..session.audit import ROLES
from ..storage.files import as_path
from ..storage.snapshots import MANIFEST
from ..text.settings import GENERATION

CONTEXT_TURNS = 4
STRATEGY = "msw"
TRUST_HELP = "0 to 1: with a message of ROLE (user, assistant, system) the memory goes this share of the way (1)"
SMALL_WORLD = "small-world"
HISTORY = "DELTAMEM_HISTORY"  # the environment's word for the file of what was typed

Value = int | float

# --- options of the answers


@dataclass(frozen=True)
class Option:
    """One option: how a text is read, which values are allowed (tested, and in words), and what it does."""

    read: Callable[[str], Value]
    holds: Callable[[Value], bool]
    allowed: str
    help: str


OPTIONS = {
    "temperature": Option(
        float,
        lambda value: GENERATION["temperature"].holds(value, 0),  # so that the session can be saved
        "a number, 0 (greedy) or more, up to 1e9",
        "0: always the likeliest token (greedy); more: samples",
    ),
    "top_p": Option(
        float,
        lambda value: 0 < value <= 1,
        "a number above 0, up to 1",
        "samples from the likeliest tokens that make up this share",
    ),
    "max_new_tokens": Option(
        int,
        lambda value: GENERATION["max_new_tokens"].holds(value, 0),
        "an integer, 1 or more, up to 1,048,576",
        "tokens of an answer at most",
    ),
    "seed": Option(int, lambda value: 0 <= value < 2**63, "an integer, 0 or more", "of sampling, set anew"),
}


def read_option(name: str, text: str, label: str | None = None) -> Value:
    """The value of option ``name`` that ``text`` stands for.

    Raises:
        ValueError: no such option, or not a value of it; ``label`` (default: the name) is what the message names.
    """
    if name not in OPTIONS:
        raise ArgumentError(f"{label or name}: no such option, allowed {', '.join(OPTIONS)}")
    option = OPTIONS[name]
    try:
        value = option.read(text)
    except ValueError:
        value = None
    if value is None or not option.holds(value):
        raise ArgumentError(f"{label or name}: got {text!r:.80}, allowed {option.allowed}")
    return value


def read_limit(text: str, label: str, allowed: str = "an integer, 1 or more, or all") -> int | None:
    """How many turns or tokens ``text`` allows; None: ``all``.

    Raises:
        ValueError: neither; the message begins with ``label``.
    """
    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise ArgumentError(f"{label}: got {text!r:.80}, allowed {allowed}")
    return int(text)


def read_trust(texts: Sequence[str], label: str = "--trust") -> dict[str, float]:
    """How far messages may move the memory, by role, as "user=0.5" says; the last one of a role counts.

    Raises:
        ValueError: it is none of that.
    """
    found = {}
    for text in texts:
        role, given, number = text.partition("=")
        if role not in ROLES or not given:
            raise ArgumentError(f"{label}: got {text!r:.80}, allowed ROLE=X, a role of {', '.join(ROLES)}")
        found[role] = read_share(number, f"{label} {role}")
    return found


def read_share(text: str, label: str) -> float:
    """A number from 0 to 1.

    Raises:
        ValueError: it is none.
    """
    try:
        value = float(text)
        check_share(value, label)
    except ValueError:
        raise ArgumentError(f"{label}: got {text!r:.80}, allowed a number from 0 to 1") from None
    return value


def read_budget(text: str, label: str = "--budget") -> float:
    """A number more than 0.

    Raises:
        ValueError: it is none.
    """
    try:
        value = float(text)
        check_trust(1.0, value)
    except ValueError:
        raise ArgumentError(f"{label}: got {text!r:.80}, allowed a finite number more than 0") from None
    return value


def generation_with(generation: Mapping[str, Any], changes: Mapping[str, Value]) -> dict[str, Any]:
    """Options for ``model.generate``: ``generation`` with ``changes`` (of OPTIONS, without the seed).

    Greedy unless a temperature above 0 or a top_p is given; what is not given is the model's own.
    """
    found = dict(generation) | dict(changes)
    if "temperature" in changes:
        found["do_sample"] = changes["temperature"] > 0
    elif "top_p" in changes:
        found["do_sample"] = True
    found.setdefault("do_sample", False)
    if not found["do_sample"]:
        found.pop("temperature", None)
        found.pop("top_p", None)
    elif "temperature" not in found:
        found["temperature"] = 1.0
    return found


def shown_options(generation: Mapping[str, Any], defaults: Mapping[str, Any], seed: int | None) -> dict[str, str]:
    """Option → its value as text; ``defaults`` hold where ``generation`` says nothing."""
    found = dict(defaults) | dict(generation)
    values = {name: found.get(name) for name in ("temperature", "top_p", "max_new_tokens")}
    if not found.get("do_sample"):
        values |= {"temperature": 0, "top_p": None}
    values["seed"] = seed
    return {name: "-" if value is None else f"{value}" for name, value in values.items()}


# --- how a chat begins


@dataclass(frozen=True)
class Opening:
    """What a chat begins with.

    Attributes:
        name: of the model, short.
        small_world: it is the shipped backbone.
        loading: arguments of ``load_patched``; no adapter: fresh parameters.
        directory: of a saved session to go on with, or None.
        settings: ``system`` and ``template`` of a new session.
        trust: ``trust`` and ``budget`` of the session, as far as they were given.
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
    trust: dict[str, Any]
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
    model, adapter = arguments.model, arguments.adapter
    if shipped:
        found = find_weights()
        model, adapter = str(found.backbone), str(found.adapters[arguments.strategy or STRATEGY])
    elif arguments.strategy is not None:
        adapter = _shipped_adapter(arguments)
    elif adapter is None:
        adapter = default_adapter(model)
    texts = {name: getattr(arguments, name) for name in OPTIONS}
    options = {
        name: read_option(name, text, f"--{name.replace('_', '-')}") for name, text in texts.items() if text is not None
    }
    texts = {"turns": arguments.context_turns, "tokens": arguments.context_tokens}
    limits = {name: read_limit(text, f"--context-{name}") for name, text in texts.items() if text is not None}
    trust: dict[str, Any] = {} if arguments.trust is None else {"trust": read_trust(arguments.trust)}
    trust |= {} if arguments.budget is None else {"budget": read_budget(arguments.budget)}
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
            **{option: getattr(arguments, option) for option in ("dtype", "backend", "guard", "quantize", "attention")},
        },
        directory=arguments.load,
        settings={
            "system": None if arguments.system is None else without_surrogates(arguments.system),
            "template": {} if arguments.thinking is None else {"enable_thinking": arguments.thinking},
        },
        trust=trust,
        limits=limits,
        seed=options.pop("seed", None),
        options=options,
        threads=check_threads(arguments.threads),
    )


def _shipped_adapter(arguments: argparse.Namespace) -> str:
    """The name of the shipped adapter that ``--strategy`` means for MODEL."""
    name = f"{arguments.model}/{arguments.strategy}"
    if arguments.adapter is not None:
        raise ArgumentError("--strategy: given with --adapter, which names another; allowed one of them")
    if not is_known(arguments.model) or name not in SHIPPED:
        raise ArgumentError(
            f"--strategy: got {arguments.strategy!r} with MODEL {arguments.model}, allowed for the shipped adapters "
            f"alone (without MODEL, or {', '.join(SHIPPED)}); --adapter names yours"
        )
    return name


def _check_load(arguments: argparse.Namespace) -> None:
    for argument, value in (("--system", arguments.system), ("--thinking, --no-thinking", arguments.thinking)):
        if value is not None:
            raise ArgumentError(f"{argument}: given with --load, whose session has its own")
    if not (as_path(arguments.load, "--load") / MANIFEST).is_file():
        raise FileMissingError(f"--load: {arguments.load}: no session there (no {MANIFEST})")
