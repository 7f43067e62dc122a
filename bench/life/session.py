"""Ten thousand turns of one session with a limited context: memory, time of a turn, files. What grows?

The kept messages do, as they must: what was said is kept word for word. Beside them nothing should.
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
from ..instrument.rows import Row, measured, spread
from ..instrument.timing import wall
from ..serving.clients import sayings
from .resident import resident

DIRECTORY = results.DIRECTORY / "life" / "session"
FULL = 10_000
CONTEXT = 4  # turns
ANSWER = 4  # tokens
WINDOW = 100  # turns whose times a row has
SLOWER = 1.5  # times as long as the first turns may the last ones take
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
    """A row for each look: processor seconds of the turns before it, and what the session takes."""
    weights = find_weights()
    model, tokenizer = load_backbone(weights.backbone)
    patch_model(model, weights.adapters[strategy])
    settings = {"context_turns": CONTEXT, "generation": {"do_sample": False, "max_new_tokens": ANSWER}}
    session = MemorySession(model, tokenizer, system="You remember what you are told.", **settings)
    said, rows, seconds = commands.progress(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn, text in enumerate(sayings("ada", turns), 1):
            begin = time.process_time()  # of all threads: others may be at work on this machine for so long
            session.answer(text)
            seconds.append(time.process_time() - begin)
            del seconds[:-WINDOW]
            if turn in looks(turns):
                rows.append(looked(session, Path(folder), seconds))
                said(f"{turn:,} turns")
    return checked(rows)


def looked(session: MemorySession, folder: Path, seconds: list[float]) -> Row:
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
        seconds,
        resident=held,
        context_tokens=session.context_tokens,
        text_bytes=sum(len(message["content"].encode()) for message in session.messages),
        json_bytes=files["session.json"],
        tensor_bytes=sum(size for name, size in files.items() if name.endswith(".safetensors")),
        files=len(files),
        save_seconds=spread(saving)[1],
        load_seconds=loading,
    )
    if not same:
        row.status, row.note = "refused", "loaded, it is another"
    return row


def checked(rows: list[Row]) -> list[Row]:
    """The rows; the last is refused if something has grown beside the messages, or slowed down."""
    first, last = rows[0], rows[-1]
    early = next((row for row in rows if row.parameters["turns"] >= 1000), first)
    problems = []
    if last.p50 > SLOWER * first.p50:
        problems.append(f"a turn takes {last.p50 / first.p50:.2f} times as long as at the beginning")
    more = 2 * PER_MESSAGE * (last.parameters["turns"] - early.parameters["turns"])
    beyond = last.values["resident"] - early.values["resident"] - more
    if beyond > BEYOND:
        problems.append(f"{beyond:,.0f} bytes more than the messages take")
    if last.values["files"] > first.values["files"]:
        problems.append(f"{last.values['files']} files, not {first.values['files']}")
    if problems and last.status == "measured":
        last.status, last.note = "refused", "; ".join(problems)
    return rows
