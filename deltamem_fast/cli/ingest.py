"""``deltamem ingest``: write a text into a memory file."""

from __future__ import annotations

import argparse
import json

from ..display import counted
from ..errors import ArgumentError
from ..memory.operators import ingest
from ..memory.state import MemoryState
from ..memory.trusting import check_trust
from ..model.loading import DTYPES, load_patched
from ..storage.files import as_path
from .given import add_text, add_trust, given_memory, given_text


def add_command(commands) -> None:
    """Add ``ingest`` to argparse's ``commands``."""
    parser = commands.add_parser(
        "ingest",
        help="write a text into a memory file",
        description="Tells a text to the memory in a file, in pieces of whole sentences, without answering. The file "
        "is made if there is none; one that is there is written further, wholly or not at all.",
    )
    parser.add_argument("model", metavar="MODEL", help="a model's directory or hub id, or smollm2")
    parser.add_argument("memory", metavar="MEMORY", help="a memory file (safetensors) of one conversation")
    add_text(parser, required=True)
    parser.add_argument("--adapter", help="a directory or hub id; needed, but for smollm2")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="default: as saved")
    parser.add_argument("--device", default="cpu", help="where the model is put (default: %(default)s)")
    add_trust(parser, "the text")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..model.known import default_adapter
    from ..model.threads import fitting_threads

    if arguments.adapter is None and default_adapter(arguments.model) is None:
        raise ArgumentError("--adapter: not given; fresh parameters remember nothing of use")
    path, text = as_path(arguments.memory, "MEMORY"), given_text(arguments)
    options = {"dtype": arguments.dtype, "device": arguments.device}
    check_trust(arguments.trust, arguments.budget, "--")
    model, tokenizer = load_patched(arguments.model, arguments.adapter, **options)
    memory = _opened(path, model)
    with fitting_threads(model):
        found = ingest(model, tokenizer, memory, text, trust=arguments.trust, budget=arguments.budget)
    memory.save(path)
    if arguments.json:
        print(json.dumps({"memory": str(path), "tokens": found.tokens} | vars(found)))
    else:
        print(f"wrote {counted(found.tokens, 'token')} in {counted(found.pieces, 'piece')} into {path}")
    return 0


def _opened(path, model) -> MemoryState:
    """The memory in a file, or an empty one where there is none.

    Raises:
        ValueError, OSError: the file holds no memory of this model and adapter, or one of several conversations.
    """
    if not path.exists():
        return MemoryState.zeros(model)
    memory = given_memory(path, model)
    if memory.batch_size != 1:
        raise ArgumentError(f"MEMORY: {path}: has {memory.batch_size} conversations, allowed one")
    return memory
