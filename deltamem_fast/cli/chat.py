"""``deltamem chat``: arguments, and how a chat begins."""

from __future__ import annotations

import argparse
import sys

from deltamem_kernels.dispatch import BACKENDS

from ..chat.options import CONTEXT_TURNS, HISTORY, OPTIONS, STRATEGY, TRUST_HELP, read_arguments
from ..model.libraries import require
from ..model.loading import ATTENTIONS, DTYPES, GUARDS, QUANTIZED
from ..model.threads import HELP
from ..recall.weights import STRATEGIES
from .given import GUARD_HELP

PACKAGES = ("prompt_toolkit", "rich")
WELL, FAILED = 0, 1  # exit codes

_DESCRIPTION = """\
A chat with a model that has a memory: the newest turns stay in its context, the memory keeps what it read of all.
Without MODEL: the small backbone and the adapters that lie in the package; nothing is downloaded. /help lists the
commands; Ctrl-C stops an answer and takes its turn back; Alt-Enter, or a \\ at the end, begins another line.
"""
_EPILOG = f"""\
Over a pipe, or with --say, each line is a turn or a command: its answer goes to stdout, without colours and thinking;
a line that fails is told in one line on stderr, and the chat goes on. Exit code: 0; 1 if such a line failed; 2 for
wrong usage, or if the chat could not begin; 130 after Ctrl-C.
What is typed in a terminal is kept in ~/.local/state/deltamem/history (under XDG_STATE_HOME if that is set), for you
alone; {HISTORY} names another file, or, if empty, none.
"""


def add_command(commands) -> None:
    """Add ``chat`` to the subparsers of ``deltamem``."""
    chat = commands.add_parser(
        "chat",
        help="talk to a model that remembers what has left its context",
        usage="deltamem chat [MODEL] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat.add_argument("model", metavar="MODEL", nargs="?", help="a chat model's directory or hub id, or smollm2")

    model = chat.add_argument_group("model")
    model.add_argument("--adapter", metavar="DIR", help="a directory or hub id (smollm2's own; else fresh parameters)")
    model.add_argument("--strategy", choices=tuple(STRATEGIES), help=f"of the shipped adapters ({STRATEGY})")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (%(default)s: as saved)")
    model.add_argument("--device", metavar="D", help="as torch names it (default: cuda if there is one, else cpu)")
    model.add_argument("--backend", choices=BACKENDS, default="auto", help="of the memory (%(default)s)")
    model.add_argument("--guard", choices=tuple(GUARDS), default="auto", help=GUARD_HELP)
    model.add_argument("--quantize", choices=QUANTIZED, help="the backbone's weights, by bitsandbytes")
    model.add_argument("--threads", type=int, metavar="N", help=HELP)
    model.add_argument("--attention", choices=ATTENTIONS, help="(default: transformers' choice)")

    talk = chat.add_argument_group("conversation")
    talk.add_argument("--system", metavar="TEXT", help="a system message")
    talk.add_argument("--load", metavar="DIR", help="go on with what /save wrote")
    talk.add_argument("--context-turns", metavar="N", help=f"turns that stay in sight ({CONTEXT_TURNS}); all: no limit")
    talk.add_argument("--context-tokens", metavar="N", help="tokens of a prompt at most (no limit)")
    talk.add_argument("--trust", metavar="ROLE=X", action="append", help=TRUST_HELP)
    talk.add_argument("--budget", metavar="X", help="how far a message may move the memory at most (no limit)")
    talk.add_argument("--say", metavar="TEXT", action="append", help="a turn or command (repeatable); then end")
    talk.add_argument("--no-history", action="store_true", help="keep nothing of what is typed")

    answers = chat.add_argument_group("answers")
    thinking = answers.add_mutually_exclusive_group()
    thinking.add_argument("--thinking", action="store_true", default=None, help="where the model's template can")
    thinking.add_argument("--no-thinking", action="store_false", dest="thinking", help="answer at once")
    answers.add_argument("--markdown", action="store_true", help="in a terminal: answers are rendered as Markdown")
    for name, option in OPTIONS.items():
        flag, metavar = f"--{name.replace('_', '-')}", "N" if option.read is int else "X"
        answers.add_argument(flag, metavar=metavar, help=option.help)
    chat.set_defaults(command=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    opening = read_arguments(arguments)
    from ..chat.loop import converse_in_terminal, converse_over_pipe

    if arguments.say or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return WELL if converse_over_pipe(opening, arguments.say) else FAILED
    require(
        PACKAGES,
        "a chat in a terminal (pip install deltamem-fast[chat]; over a pipe, or with --say, no package is needed)",
    )
    converse_in_terminal(opening, history=not arguments.no_history, markdown=arguments.markdown)
    return WELL
