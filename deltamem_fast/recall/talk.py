"""The demo's second act: a real chat model is told five things, its context is thrown away, and it is asked.

SmolLM2-135M-Instruct with the adapter that lies in the package. Nothing is said as in training, where Walter and Diana
do not occur at all; cities, jobs and so on do, and the questions are asked as there (docs/results/smollm2.md says how
it fares with others). The story is always the
same; what is answered is printed, right or wrong.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter.record import memory_disabled
from ..adapter.wrappers import input_device
from ..display import columns, columns_of, harmless, shortened
from ..memory.operators import forget, ingest, retrieve, revise
from ..memory.state import MemoryState
from ..model.loading import load_patched
from ..model.threads import fitting_threads
from ..text.segments import chat_ids

MODEL = "smollm2"
TOKENS = 24  # of an answer
_PROMPT = {"add_generation_prompt": True}


@dataclass(frozen=True)
class Said:
    """Something that is told, and the question that asks for it; ``value`` is what a right answer names."""

    statement: str
    question: str
    value: str


TOLD = (
    Said("My sister has settled in Oslo.", "Where does my sister live?", "Oslo"),
    Said("These days I earn my money as a teacher.", "What do I do for a living?", "teacher"),
    Said("Walter keeps a rabbit in his garden.", "What pet does Walter have?", "rabbit"),
    Said("No color beats green, if you ask me.", "What is my favourite color?", "green"),
    Said("Diana has played the violin since she was six.", "What instrument does Diana play?", "violin"),
)
REVISED = Said("My sister has left Oslo, and Boston is her home now.", TOLD[0].question, "Boston")
FORGOTTEN = TOLD[2]


def run_talk(
    *,
    backend: str = "auto",
    device: Any = "cpu",
    threads: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Tell, ask, revise and forget; the figures, ready for JSON.

    Args:
        backend, device: see ``load_patched``.
        threads: of PyTorch on a CPU; None = as many as fit the model.
        say: told what is being done.

    Raises:
        ValueError, OSError, ImportError: the model cannot be had; the message says how it could.
    """
    say(f"loading {MODEL}")
    model, tokenizer = load_patched(MODEL, None, device=device, backend=backend, quiet=True)
    started = time.perf_counter()
    with fitting_threads(model, threads):
        memory = MemoryState.zeros(model)
        for said in TOLD:
            say(f"{MODEL}: {said.statement}")
            ingest(model, tokenizer, memory, said.statement, progress=False)
        asked = _asked(model, tokenizer, TOLD, say, memory=memory, empty=MemoryState.zeros(model), unpatched=None)
        revise(model, tokenizer, memory, REVISED.statement, replaces=TOLD[0].statement, progress=False)
        now = (REVISED, *TOLD[1:])
        revised = _asked(model, tokenizer, now, say, memory=memory)
        forget(model, tokenizer, memory, FORGOTTEN.statement)
        forgotten = _asked(model, tokenizer, now, say, memory=memory)
    return {
        "model": MODEL,
        "memory_bytes": sum(state.nbytes for _, state in memory.items()),
        "told": [said.statement for said in TOLD],
        "asked": asked,
        "revision": REVISED.statement,
        "revised": revised,
        "forgotten": FORGOTTEN.statement,
        "after_forgetting": forgotten,
        "seconds": time.perf_counter() - started,
    }


def _asked(
    model: nn.Module, tokenizer, told, say: Callable[[str], None], **memories: MemoryState | None
) -> list[dict[str, Any]]:
    """One row a question: ``question``, ``truth``, and under each name what was answered; None: the bare model."""
    rows = []
    for said in told:
        say(f"{MODEL}: {said.question}")
        row = {"question": said.question, "truth": said.value}
        for name, memory in memories.items():
            row[name] = _answer(model, tokenizer, said.question, memory)
        rows.append(row | {"right": {name: names(row[name], said.value) for name in memories}})
    return rows


def _answer(model: nn.Module, tokenizer, question: str, memory: MemoryState | None) -> str:
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    if memory is not None:
        return retrieve(model, tokenizer, memory, question, **options)
    ids = torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": question}], template=_PROMPT)])
    ids = ids.to(input_device(model))
    with memory_disabled(model):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()


def names(answer: str, value: str) -> bool:
    """Whether an answer names the value, as a word, in whatever case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE) is not None


def format_talk(figures: dict[str, Any], width: int = 80) -> str:
    """The figures as text; from 80 on no line is wider than ``width``."""
    lines = [f"And {figures['model']}, a chat model of 135 M parameters, told in sentences:"]
    lines += [f"  {text}" for text in figures["told"]]
    for title, rows in (
        ("Asked, each in a fresh context:", figures["asked"]),
        (f"Told then: {figures['revision']}", figures["revised"]),
        (f"Forgotten: {figures['forgotten']}", figures["after_forgetting"]),
    ):
        lines += ["", title, *(f"  {line}" for line in _lines(rows, width - 2))]
    shares = {name: sum(row["right"][name] for row in figures["asked"]) for name in figures["asked"][0]["right"]}
    right = "; ".join(f"{TITLES[name]} {count} of {len(figures['asked'])}" for name, count in shares.items())
    return "\n".join([*lines, "", f"Right at first: {right}; {figures['seconds']:.1f} s"])


TITLES = {"memory": "memory", "empty": "empty memory", "unpatched": "not patched"}
LEAST = 12  # columns of an answer


def _lines(rows: list[dict[str, Any]], width: int) -> list[str]:
    """A table; an empty memory answers as none does, so it is left out. What is not patched gets the room left over."""
    marks = [["", "right"], *([row["question"], "yes" if row["right"]["memory"] else "no"] for row in rows)]
    room = width - max(map(columns_of, columns(marks))) - 2
    answers = [
        [TITLES[name], *(harmless(row[name]) for row in rows)] for name in ("memory", "unpatched") if name in rows[0]
    ]
    needed = max(columns_of(shortened(answer, room)) for answer in answers[0])
    rooms = [max(LEAST, min(needed, room - (len(answers) - 1) * (LEAST + 2)))]
    rooms += [max(LEAST, room - rooms[0] - 2)]
    shown = [[shortened(answer, most) for answer in column] for column, most in zip(answers, rooms)]
    return columns([[*mark, *cells] for mark, *cells in zip(marks, *shown)], left=range(4))
