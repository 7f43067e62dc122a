"""Ten thousand turns of one session with a limited context: memory, time of a turn, files. What grows?

The kept messages do, as they must: what was said is kept word for word. Beside them nothing should. Over such a time a
machine has other work, too: so a turn's time is told beside that of a session that has just begun, turn by turn.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch

from deltamem_fast import MemorySession, patch_model
from deltamem_fast.recall.weights import find_weights, load_backbone

from ..instrument import commands, results
from ..instrument.rows import Row, compare, measured, spread
from ..instrument.timing import wall
from ..serving.clients import sayings
from .resident import resident

DIRECTORY = results.DIRECTORY / "life" / "session"
FULL = 10_000
CONTEXT = 4  # turns
ANSWER = 4  # tokens
PAIRS = 40  # turns whose times a row has, by turns with those of a new session
SLOWER = 1.2  # times as long as a new session's turn may one take
BEYOND = 16 * 2**20  # bytes that a process may grow by beside the messages, from turn 1,000 to the last
PER_MESSAGE = 1500  # bytes that a kept message takes in the process, its text of some sixty letters included


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.life session``."""
    parser.add_argument("--turns", type=int, default=FULL, help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    """Measure, write, print; the exit status is 1 if something has grown or slowed down."""
    if options.turns < 2:
        raise ValueError(f"--turns: got {options.turns}, allowed 2 or more")
    rows = measure(options.turns)
    return commands.finish(rows, {"quick": options.turns < FULL, "turns": options.turns}, options.output)


def looks(turns: int) -> list[int]:
    """After which turns one looks: powers of ten from 100 on, and the last."""
    return [n for n in (100, 1000, 10_000, 100_000) if n < turns] + [turns]


def measure(turns: int, strategy: str = "msw") -> list[Row]:
    """A row for each look: seconds of turns, beside those of a new session, and what the session takes."""
    weights = find_weights()
    model, tokenizer = load_backbone(weights.backbone)
    patch_model(model, weights.adapters[strategy])
    settings = {"context_turns": CONTEXT, "generation": {"do_sample": False, "max_new_tokens": ANSWER}}

    def begin() -> MemorySession:
        return MemorySession(model, tokenizer, system="You remember what you are told.", **settings)

    session, said, rows = begin(), commands.progress(), []
    with tempfile.TemporaryDirectory() as folder:
        for turn, text in enumerate(sayings("ada", turns), 1):
            session.answer(text)
            if turn in looks(turns):
                rows.append(looked(session, Path(folder), timed(session, begin())))
                said(f"{turn:,} turns")
    return checked(rows)


def timed(session: MemorySession, new: MemorySession) -> tuple[list[float], list[float]]:
    """Seconds of ``PAIRS`` turns of a session and of a new one that has as many turns in sight, by turns."""
    for text in sayings("eve", CONTEXT):
        new.answer(text)
    before, found = session.snapshot(), ([], [])
    for text in sayings("eve", PAIRS):
        for seconds, one in zip(found, (session, new)):
            seconds.append(wall(lambda one=one, text=text: one.answer(text), "cpu"))
    session.restore(before)
    return found


def looked(session: MemorySession, folder: Path, seconds: tuple[list[float], list[float]]) -> Row:
    """A row of a session as it is; it is saved over its last snapshot and loaded again."""
    gc.collect()
    held = resident()
    saving = [wall(lambda: session.save(folder), "cpu") for _ in range(3)]
    begin = time.perf_counter()
    loaded = MemorySession.load(folder, session.model, session.tokenizer)
    loading = time.perf_counter() - begin
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    same = loaded.messages == session.messages and all(
        torch.equal(loaded.memory[i], session.memory[i]) for i in session.memory
    )
    row = measured(
        "session/turns",
        {"turns": session.turns, "context": CONTEXT, "answer": ANSWER},
        seconds[0],
        resident=held,
        context_tokens=session.context_tokens,
        text_bytes=sum(len(message["content"].encode()) for message in session.messages),
        json_bytes=files["session.json"],
        tensor_bytes=sum(size for name, size in files.items() if name.endswith(".safetensors")),
        files=len(files),
        save_seconds=spread(saving)[1],
        load_seconds=loading,
    )
    compare(row, "a new session", seconds[1], seconds[0])
    if not same:
        row.status, row.note = "refused", "loaded, it is another"
    return row


def checked(rows: list[Row]) -> list[Row]:
    """The rows; the last is refused if something has grown beside the messages, or slowed down."""
    first, last = rows[0], rows[-1]
    early = next((row for row in rows if row.parameters["turns"] >= 1000), first)
    problems = []
    slower = 1 / last.ratios["a new session"][1]
    if slower > SLOWER:
        problems.append(f"a turn takes {slower:.2f} times as long as a new session's")
    more = 2 * PER_MESSAGE * (last.parameters["turns"] - early.parameters["turns"])
    beyond = last.values["resident"] - early.values["resident"] - more
    if beyond > BEYOND:
        problems.append(f"{beyond:,.0f} bytes more than the messages take")
    if last.values["files"] > first.values["files"]:
        problems.append(f"{last.values['files']} files, not {first.values['files']}")
    if problems and last.status == "measured":
        last.status, last.note = "refused", "; ".join(problems)
    return rows
