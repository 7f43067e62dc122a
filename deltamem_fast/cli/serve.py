"""``deltamem serve``: an HTTP endpoint that remembers its users."""

from __future__ import annotations

import argparse
import os
import re

from deltamem_kernels.dispatch import BACKENDS

from ..arguments import check_integer
from ..errors import ArgumentError
from ..memory.trusting import check_trust
from ..model.libraries import require
from ..model.loading import DTYPES, GUARDS
from ..model.threads import HELP, check_threads
from ..serving.hosts import is_loopback
from .given import GUARD_HELP, add_trust

KEY = "DELTAMEM_API_KEY"
ENGINES = ("transformers", "vllm")
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_DESCRIPTION = """\
Chat completions over HTTP, as OpenAI's clients ask for them, with a memory for each user: a request's memory_id says
whose is read and written. Memories lie in a bank, a file of this machine. Without MODEL: smollm2 where it can be had
without downloading, else the small backbone in the package.
"""
_EPILOG = f"""\
{KEY}: the bearer token that requests must have. Needed to listen beyond this machine. Ends at Ctrl-C or SIGTERM, when
what is under way is answered.

  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' -d \\
    '{{"model": "smollm2", "memory_id": "ada", "messages": [{{"role": "user", "content": "My name is Ada."}}]}}'
"""


def add_command(commands) -> None:
    """Add ``serve`` to argparse's ``commands``."""
    parser = commands.add_parser(
        "serve",
        help="an HTTP endpoint (OpenAI's chat completions) that remembers its users",
        usage="deltamem serve [MODEL] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a chat model's directory or hub id, or smollm2")
    parser.add_argument("--adapter", metavar="DIR", help="a directory or hub id; needed, but for smollm2")
    parser.add_argument(
        "--bank", metavar="FILE", help="of the memories (default: NAME.bank in ~/.local/state/deltamem)"
    )
    parser.add_argument("--name", help="of the model, as requests call it (default: the last part of MODEL)")
    parser.add_argument("--host", default="127.0.0.1", help="an address of this machine (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="what answers (default: %(default)s)")
    parser.add_argument(
        "--engine-args", metavar="JSON", help="of vLLM's engine, such as '{\"tensor_parallel_size\": 2}'"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (%(default)s: as saved)")
    model.add_argument("--device", metavar="D", help="as torch names it (default: cuda if there is one, else cpu)")
    model.add_argument("--backend", choices=BACKENDS, default="auto", help="of the memory (%(default)s)")
    model.add_argument("--guard", choices=tuple(GUARDS), default="auto", help=GUARD_HELP)
    model.add_argument("--threads", type=int, metavar="N", help=HELP)
    memory = parser.add_argument_group("how far a turn may move a memory")
    add_trust(memory, "a turn", "; a request's own trust goes below it")
    limits = parser.add_argument_group("limits")
    for flag, default, told in (
        ("--max-batch", 16, "requests in one batch"),
        ("--max-batch-tokens", 32_768, "tokens of a batch, the longest request times their number"),
        ("--max-waiting", 256, "requests that may wait; more are refused (429)"),
        ("--max-tokens", None, "tokens of prompt and answer together; more are refused (413; default: the model's)"),
        ("--answer-tokens", 512, "tokens of an answer, where the request does not say"),
        ("--max-body", 4 * 2**20, "bytes of a request; more are refused (413)"),
    ):
        shown = "" if default is None else " (%(default)s)"
        limits.add_argument(flag, type=int, metavar="N", default=default, help=told + shown)
    parser.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    require(PACKAGES, "deltamem serve (pip install deltamem-fast[serve])")
    for name, least in (
        ("max_batch", 1),
        ("max_batch_tokens", 1),
        ("max_waiting", 1),
        ("answer_tokens", 1),
        ("max_body", 1),
    ):
        check_integer(getattr(arguments, name), f"--{name.replace('_', '-')}", least)
    check_integer(arguments.max_tokens, "--max-tokens", 2, or_none=True)
    check_integer(arguments.port, "--port", 0, 65_535)
    check_trust(arguments.trust, arguments.budget, "--")
    key = checked_key(arguments.host)
    threads = check_threads(arguments.threads)
    if arguments.engine == "vllm":
        for name in ("device", "threads"):
            if getattr(arguments, name) is not None:
                raise ArgumentError(f"--{name}: given with --engine vllm, which has its own")
        require(("vllm",), "deltamem serve --engine vllm (pip install deltamem-fast[serve,vllm])")
        from ..vllm.serve import serve
    else:
        if arguments.engine_args is not None:
            raise ArgumentError("--engine-args: given without --engine vllm, which they are for")
        from ..serving.run import serve
    return serve(arguments, key, threads)


def checked_key(host: str) -> str | None:
    """The bearer token of the environment, or None.

    Raises:
        ValueError: there is none, and ``host`` is not of this machine alone; or it is none that a header can have.
    """
    key = os.environ.get(KEY) or None
    if key is None and not is_loopback(host):
        raise ArgumentError(
            f"--host: got {host!r}, which others can reach, without a token in {KEY}; allowed without one: 127.0.0.1, "
            "::1, localhost"
        )
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise ArgumentError(f"{KEY}: allowed a token of visible ASCII characters, without spaces")
    return key
