"""MemoryBank with a million users: room on the disk, and how long gathering and committing a batch takes.

The store is really filled, through MemoryBank.commit, with random memories in the shape of Qwen3-4B's (36 layers, one
8×8 float32 each) under ids in random order. Takes three minutes and 10 GB in --directory, freed at the end.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deltamem_fast import MemoryBank, MemoryState, patch_model

from ..instrument import backbones, commands, results
from ..instrument.rows import Row, counted, measured, refused
from ..instrument.tables import duration
from ..instrument.timing import wall

DIRECTORY = results.DIRECTORY / "bank"
FULL = 1_000_000
BATCH = 4096  # memories a commit while filling
DRAWS = {"warm": 200, "cold": 20, "commit": 50}  # of fresh ids
QUICK_DRAWS = {"warm": 20, "cold": 2, "commit": 5}
SIZE_TARGET = 12e9  # bytes of a million users
GATHER_TARGET = 0.010  # seconds of 512 ids


def backbone():
    """A patched model with Qwen3-4B's 36 layers and next to no weights: a bank knows only its memories' shapes."""
    config = backbones.configuration("Qwen3-4B", tiny=True, num_hidden_layers=36)
    return patch_model(backbones.build(config, torch.float32, "cpu"))


def name_of(user: int) -> str:
    """An id; those of successive users lie anywhere among the others, as those of real ones do."""
    return f"user-{hashlib.blake2b(user.to_bytes(8, 'big'), digest_size=8).hexdigest()}"


def random_memory(model, rows: int, seed: int) -> MemoryState:
    """Memories of uniform random numbers, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    memory = MemoryState.zeros(model, rows)
    for _, state in memory.items():
        state.uniform_(-1, 1, generator=generator)
    return memory


def fill(bank: MemoryBank, model, users: int) -> list[float]:
    """Commit ``users`` memories; returns the seconds of each commit of BATCH."""
    from tqdm import tqdm

    seconds = []
    with tqdm(total=users, unit="user", unit_scale=True, desc="filling", mininterval=1) as bar:
        for start in range(0, users, BATCH):
            rows = min(BATCH, users - start)
            memory = random_memory(model, rows, start)
            ids = [name_of(start + n) for n in range(rows)]
            seconds.append(wall(functools.partial(bank.commit, ids, memory), "cpu"))
            bar.update(rows)
    return seconds


def wrong(bank: MemoryBank, model, users: int, batches: int = 8) -> str:
    """What of some batches is not as it was committed, bit for bit; "" if nothing."""
    if len(bank) != users:
        return f"holds {len(bank)} memories, not {users}"
    starts = list(range(0, users, BATCH))
    for start in {starts[0], starts[-1], *random.sample(starts, min(batches, len(starts)))}:
        rows = min(BATCH, users - start)
        chosen = random.sample(range(rows), min(64, rows))
        theirs = random_memory(model, rows, start).select(chosen)
        ours = bank.gather([name_of(start + n) for n in chosen])
        if not all(torch.equal(ours[i], theirs[i]) for i in theirs):
            return f"memories of the batch from user {start} are not those that were committed"
    return ""


def timed(
    call: Callable[..., object], users: int, ids: int, draws: int, prepare: Callable[..., tuple] = lambda ids: ()
) -> list[float]:
    """Seconds of ``call`` with fresh random ids each time, and with what ``prepare`` makes of them off the clock."""
    seconds = []
    for _ in range(draws):
        drawn = [name_of(user) for user in random.sample(range(users), ids)]
        seconds.append(wall(functools.partial(call, drawn, *prepare(drawn)), "cpu"))
    return seconds


def commits(bank: MemoryBank, users: int, ids: int, draws: int) -> list[float]:
    """Seconds of committing random ids that are there, each time just gathered."""
    return timed(bank.commit, users, ids, draws, lambda drawn: (bank.gather(drawn).decay(0.5),))


# Both must not run while this process has the bank open: closing any descriptor of a file gives up SQLite's locks.


def read_once(path: Path) -> None:
    """Have the operating system keep the file's pages in memory, as far as they fit."""
    with open(path, "rb", buffering=0) as file:
        while file.read(2**24):
            pass


def drop_pages(path: Path) -> bool:
    """Have the operating system forget the file's pages; False where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def cold_gathers(path: Path, model, users: int, ids: int, draws: int) -> list[float]:
    """Seconds of the first gather after opening, nothing of the file in memory; [] where that cannot be had."""
    seconds = []
    for _ in range(draws):
        if not drop_pages(path):
            return []
        with MemoryBank(path, model) as bank:
            seconds += timed(bank.gather, users, ids, 1)
    return seconds


def measure(path: Path, model, users: int, ids: int) -> list[Row]:
    """All rows of a bank at ``path``, which must not be there."""
    sizes, draws = {"users": users, "ids": ids}, DRAWS if users >= FULL else QUICK_DRAWS
    with MemoryBank(path, model) as bank:
        filling = fill(bank, model, users)
        problem = wrong(bank, model, users)
    if problem:
        return [refused("bank", sizes, problem)]
    size = path.stat().st_size  # after closing: nothing waits in the log
    rows = [counted("bank/size", {"users": users}, bytes=size, bytes_per_user=size / users)]
    full = filling[:-1] if len(filling) > 2 else filling * 2  # the last one is smaller
    new = {"users": users, "ids": min(BATCH, users)}
    rows.append(measured("bank/commit-new", new, full, users_per_second=users / sum(filling)))
    read_once(path)
    with MemoryBank(path, model) as bank:
        timed(bank.gather, users, ids, draws["warm"] // 10)
        warm = timed(bank.gather, users, ids, draws["warm"])
        rows.append(measured("bank/gather", sizes | {"pages": "in memory"}, warm))
        listings = {
            "bank/list-newest": lambda _: bank.list(order_by="updated", descending=True, limit=100),
            "bank/list-prefix": lambda _: bank.list(prefix="user-00"),
            "bank/count": lambda _: len(bank),
        }
        rows += [measured(name, {"users": users}, timed(call, users, ids, 10)) for name, call in listings.items()]
        begin = time.perf_counter()
        listed = bank.list()
        rows.append(counted("bank/list-all", {"users": users}, seconds=time.perf_counter() - begin))
        if len(listed) != users:
            return [refused("bank", sizes, f"lists {len(listed)} memories")]
    cold = cold_gathers(path, model, users, ids, draws["cold"])
    if cold:
        rows.append(measured("bank/gather", sizes | {"pages": "on disk"}, cold))
    for durable in (True, False):
        with MemoryBank(path, model, durable=durable) as bank:
            commits(bank, users, ids, draws["commit"] // 5)
            seconds = commits(bank, users, ids, draws["commit"])
            # Every fourth or so copies the log into the file, which the median does not show.
            mean = sum(seconds) / len(seconds)
            rows.append(measured("bank/commit", sizes | {"durable": durable}, seconds, mean_seconds=mean))
    return rows


def verdicts(rows: list[Row], users: int, ids: int) -> list[str]:
    """A line for each target, with the figure and whether it is met."""
    found = {row.name if row.parameters.get("pages") != "on disk" else "cold": row for row in rows}
    if "bank/size" not in found:
        return [f"refused: {rows[0].note}"]
    size, gather = found["bank/size"].values, found["bank/gather"]
    million = size["bytes_per_user"] * FULL
    said = [
        f"size: {size['bytes'] / 1e9:.2f} GB for {users:,} users, {size['bytes_per_user']:,.0f} bytes a user; "
        f"a million under {SIZE_TARGET / 1e9:g} GB: {'yes' if million < SIZE_TARGET else 'NO'}",
        f"filling: {found['bank/commit-new'].values['users_per_second']:,.0f} users/s in durable commits of {BATCH:,}",
        f"gather of {ids} random ids, pages in memory: {duration(gather.p50)} "
        f"(p20 {duration(gather.p20)}, p80 {duration(gather.p80)}, {gather.samples} draws); "
        f"under {GATHER_TARGET * 1e3:g} ms: {'yes' if gather.p50 < GATHER_TARGET else 'NO'}",
    ]
    if "cold" in found:
        cold = found["cold"]
        said.append(f"gather just after opening, no page in memory: {duration(cold.p50)} (p80 {duration(cold.p80)})")
    for row in rows:
        if row.name == "bank/commit":
            kind = "synced" if row.parameters["durable"] else "durable=False"
            said.append(
                f"commit of {ids} ids that are there, {kind}: {duration(row.p50)} (p80 {duration(row.p80)}, "
                f"mean {duration(row.values['mean_seconds'])} with checkpoints)"
            )
    return said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.memory bank``."""
    parser.add_argument("--users", type=int, default=FULL, help="memories in the bank")
    parser.add_argument("--ids", type=int, default=512, help="memories of a batch")
    parser.add_argument("--directory", type=Path, help="where the bank lies meanwhile (default: a temporary folder)")


def run(options: argparse.Namespace) -> int:
    """Measure, write, print; the exit status is 1 if something was refused.

    Raises:
        ValueError: a batch that is no part of the bank.
        OSError: the disk has no room.
    """
    if not 1 <= options.ids <= options.users:
        raise ValueError(f"--ids: got {options.ids}, allowed 1 to --users")
    torch.manual_seed(0)
    random.seed(0)
    with commands.roomy_folder(options.users * 11_000, options.directory) as folder:
        rows = measure(folder / "users.bank", backbone(), options.users, options.ids)
    arguments = {"quick": options.users < FULL, "users": options.users, "ids": options.ids}
    status = commands.finish(rows, arguments, options.output)
    print("\n" + "\n".join(verdicts(rows, options.users, options.ids)))
    return status
