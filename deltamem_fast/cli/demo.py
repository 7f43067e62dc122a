"""``deltamem demo``: arguments, output and exit code of the recall proof."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from random import Random

from deltamem_kernels.dispatch import BACKENDS

from ..display import style_of, terminal_columns
from ..errors import DeltaMemError
from ..model.loading import device_for
from ..model.threads import HELP, check_threads, fitting_threads
from ..recall.weights import STRATEGIES, find_weights, load_backbone
from ..storage.files import as_path

HOLDS, DOES_NOT_HOLD = 0, 1
QUESTIONS = 256


def add_command(commands) -> None:
    """Add ``demo`` to argparse's ``commands``."""
    demo = commands.add_parser(
        "demo",
        help="the recall proof: told facts are answered from the memory alone",
        description="Tells a small frozen backbone facts about names that it has never seen, throws the context away, "
        "and asks: with the memory, with an empty one, and not patched. Revises a fact and asks again. Then measures "
        "recall against the number of facts for each write strategy, and draws the state as it fills. Exit code 1 "
        "if something that is claimed does not hold.",
    )
    mode = demo.add_mutually_exclusive_group()
    mode.add_argument("--json", action="store_true", help="the figures as one JSON object")
    mode.add_argument("--interactive", action="store_true", help="tell facts and ask for them yourself (/help)")
    demo.add_argument(
        "--strategy", choices=tuple(STRATEGIES), default="msw", help="of the story, and of --interactive (%(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of names, facts and sentences (default: %(default)s)")
    demo.add_argument(
        "--questions", type=int, default=QUESTIONS, metavar="N", help="at each number of facts (default: %(default)s)"
    )
    demo.add_argument("--output", metavar="DIR", default="demo-output", help="for memory and picture (%(default)s)")
    demo.add_argument("--weights", metavar="DIR", help="backbone and adapters (default: the shipped ones)")
    demo.add_argument("--backend", choices=BACKENDS, default="auto", help="default: %(default)s")
    demo.add_argument("--threads", type=int, metavar="N", help=HELP)
    demo.add_argument("--no-talk", dest="talk", action="store_false", help="leave out the second act, with smollm2")
    demo.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    return _converse(arguments) if arguments.interactive else _prove(arguments)


def _prove(arguments: argparse.Namespace) -> int:
    from ..recall.demo import failed_checks, run_demo
    from ..recall.demo_text import format_demo

    as_path(arguments.output, "--output")
    say = _progress()
    figures, snapshots = run_demo(
        weights=arguments.weights,
        strategy=arguments.strategy,
        seed=arguments.seed,
        questions=arguments.questions,
        output=arguments.output,
        backend=arguments.backend,
        threads=check_threads(arguments.threads),
        say=say,
    )
    say("")
    text = (
        "" if arguments.json else format_demo(figures, snapshots, style=style_of(sys.stdout), width=terminal_columns())
    )
    if text:
        print(text, flush=True)
    if arguments.talk:
        figures["talk"] = _talk(arguments, say)
        if text:
            print(f"\n{_talk_text(figures['talk'])}")
    if not text:
        print(json.dumps(figures, indent=2))
    failed = failed_checks(figures)
    for text in failed:
        print(f"deltamem: demo: DOES NOT HOLD: {text}", file=sys.stderr)
    return DOES_NOT_HOLD if failed else HOLDS


def _talk(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict:
    """The second act's figures, or why there is none: the model is downloaded, or installed, and need not be."""
    from ..recall.talk import run_talk

    try:
        device = device_for(arguments.backend)
        return run_talk(backend=arguments.backend, device=device, threads=check_threads(arguments.threads), say=say)
    except DeltaMemError as error:
        return {"absent": str(error).removeprefix("MODEL: ")}
    finally:
        say("")


def _talk_text(figures: dict) -> str:
    from ..recall.talk import format_talk

    if "absent" in figures:
        return f"The second act, with a real chat model, is left out: {figures['absent']}"
    return format_talk(figures, terminal_columns())


def _converse(arguments: argparse.Namespace) -> int:
    from ..model.patch import patch_model
    from ..recall.hints import converse

    device = device_for(arguments.backend)
    found = find_weights(arguments.weights)
    model, tokenizer = load_backbone(found.backbone, device)
    patch_model(model, found.adapters[arguments.strategy], backend=arguments.backend)
    print(f"Tell facts, ask for them; only the memory ({arguments.strategy}) passes from line to line. /help says how.")
    random = Random(arguments.seed)
    style = style_of(sys.stdout)
    with fitting_threads(model, check_threads(arguments.threads)):
        say = functools.partial(print, flush=True)
        converse(model, tokenizer, _typed_lines(), say, random=random, style=style, width=terminal_columns())
    return HOLDS


def _typed_lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        from ..chat.loop import typed_lines

        yield from typed_lines()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() edits lines and recalls earlier ones once it is imported)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _progress() -> Callable[[str], None]:
    """Says on one line of a terminal what is being done; nothing to a pipe."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)
