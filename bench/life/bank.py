"""A bank of a million users under mixed load by several processes that are killed: is anything lost, does it grow?

Reads that are compared bit for bit, commits, new users, deletes, lists, and ids that all count up against each other.
All processes but the first are killed (SIGKILL) by turns; each goes on where it was killed. At the end every user is
compared with what the journals say was acknowledged.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from deltamem_fast import MemoryBank
from deltamem_fast.storage.bank_sqlite import WAL_BYTES

from ..instrument import commands, results
from ..instrument.rows import Row, counted
from ..memory.bank import name_of
from . import bank_worker
from .bank_worker import GONE, SHARED, Truth, check, live, memories, model_of_all, shared_name, truth_of
from .resident import grown, resident

DIRECTORY = results.DIRECTORY / "life" / "bank"
FULL, HOUR = 1_000_000, 3600.0
FILL = 4096  # memories a commit while filling
LOOK = 512  # users a look at the end
GROWTH = 64 * 2**20  # bytes that the process which is not killed may have grown by in the last third of the time
LOG = WAL_BYTES + 4 * 2**20  # bytes that the log (-wal) may have: it is emptied behind the commit that passes WAL_BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.life bank``."""
    parser.add_argument("--users", type=int, default=FULL, help="when it begins (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=HOUR, help="of load (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=3, help="processes (default: %(default)s)")
    parser.add_argument("--kill-every", type=float, default=10.0, help="seconds (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="where the bank lies meanwhile (default: a temporary folder)")


def run(options: argparse.Namespace) -> int:
    """Measure, write, print; the exit status is 1 if something was lost or has grown.

    Raises:
        ValueError: too few users or workers.
        OSError: the disk has no room.
    """
    if options.workers < 2 or options.users < options.workers:
        raise ValueError(f"--workers, --users: got {options.workers} and {options.users}, allowed 2 or more, and users "
                         "for each")  # fmt: skip
    with commands.roomy_folder(options.users * 14_000, options.directory) as folder:
        row = measure(folder, options.users, options.seconds, options.workers, options.kill_every)
    return commands.finish([row], {"quick": options.users < FULL or options.seconds < 600}, options.output)


def measure(folder: Path, users: int, seconds: float, workers: int, kill_every: float) -> Row:
    """The row of one run in ``folder``."""
    torch.set_num_threads(1)
    model, path, said = model_of_all(), folder / "users.bank", commands.progress()
    fill(path, model, users)
    size = path.stat().st_size
    said(f"{users:,} users, {size:,} bytes")
    load = Load(path, folder, users, workers)
    problems = load.run(seconds, kill_every)
    said(f"{load.kills} kills")
    truths = [truth_of(load.journal(n), n, workers, users) for n in range(workers)]
    problems += audit(path, model, truths)
    said("compared")
    done = {kind: sum(truth.operations[kind] for truth in truths) for kind in truths[0].operations}
    row = counted(
        "bank/under kills",
        {"users": users, "seconds": seconds, "workers": workers},
        kills=load.kills,
        writes=done[bank_worker.WRITE],
        deletes=done[bank_worker.DELETE],
        counts=done[bank_worker.COUNT],
        doubtful_counts=int(sum(truth.uncertain.sum() for truth in truths)),
        users_at_the_end=int(sum((truth.marks != GONE).sum() for truth in truths)),
        bytes_at_first=size,
        bytes_at_the_end=path.stat().st_size,
        most_log_bytes=load.log,
        resident=load.held[-1] if load.held else 0,
        grown=load.grown,
    )
    # As many users more as room was left for, and a tenth for half-filled pages.
    most = 1.1 * size * max(1, len(truths[0].marks) * workers / users)
    if row.values["bytes_at_the_end"] > most:
        problems.append(f"the file has {path.stat().st_size:,} bytes, more than {most:,.0f}")
    if load.log > LOG:
        problems.append(f"its log had {load.log:,} bytes")
    if load.grown > GROWTH:
        problems.append(f"a process has grown by {load.grown:,} bytes")
    if problems:
        row.status, row.note = "refused", "; ".join(problems[:5])
    return row


def fill(path: Path, model, users: int) -> None:
    """Commit ``users`` memories of mark 0, and the shared ones, empty."""
    with MemoryBank(path, model) as bank:
        for first in range(0, users, FILL):
            numbers = np.arange(first, min(users, first + FILL))
            ids = [name_of(int(n)) for n in numbers]
            bank.commit(ids, memories(model, numbers, np.zeros(len(numbers), np.int64)))
        shared = bank.gather(shared_name(n) for n in range(SHARED))
        bank.commit(shared.ids, shared)


def audit(path: Path, model, truths: list[Truth]) -> list[str]:
    """What the bank holds that was not acknowledged, and the other way round; [] where it is right."""
    workers, problems = len(truths), []
    with MemoryBank(path, model) as bank:
        wanted = SHARED + sum(int((truth.marks != GONE).sum()) for truth in truths)
        if len(bank) != wanted:
            problems.append(f"it holds {len(bank):,} memories, not {wanted:,}")
        for number, truth in enumerate(truths):
            if truth.doubt is not None:
                problems.append(f"worker {number} left an operation unanswered")
            for marks, users in _looks(truth.marks, number, workers):
                if not check(bank, model, users, marks):
                    problems.append(f"of {name_of(int(users[0]))} and others: not what was acknowledged")
        found = bank.gather(shared_name(n) for n in range(SHARED))
        least = sum(truth.counted for truth in truths)
        most = least + sum(truth.uncertain for truth in truths)
        for i, state in found.items():
            counts = state.flatten(1).numpy()
            if (counts != counts[:, :1]).any() or (counts[:, 0] < least).any() or (counts[:, 0] > most).any():
                problems.append(f"shared ids were counted to {counts[:, 0].tolist()} in layer {i}, "
                                f"allowed {least.tolist()} to {most.tolist()}")  # fmt: skip
                break
    return problems


def _looks(marks: np.ndarray, number: int, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(marks), LOOK):
        places = np.arange(first, min(len(marks), first + LOOK))
        yield marks[places], places * workers + number


class Load:
    """Workers on a bank, which are killed and started again.

    Attributes:
        kills: how often one was killed.
        held: bytes that the first worker, which is not killed, has held from time to time.
        log: the most bytes that the log had.
    """

    def __init__(self, path: Path, folder: Path, users: int, workers: int):
        self._path, self._folder, self._users, self._workers = path, folder, users, workers
        # Not forked from this process, which has threads; nor each begun anew, which would take seconds to import.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["bench.life.bank_worker"])
        self.kills, self.log = 0, 0
        self.held: list[int] = []
        self._before: dict[int, int] = {}

    @property
    def grown(self) -> int:
        """Bytes that the first worker has grown by in the last third of the time."""
        return grown(self.held)

    def journal(self, number: int) -> Path:
        """Where a worker says what it does."""
        return self._folder / f"journal-{number}"

    def _said(self, number: int) -> int:
        """Bytes of a worker's journal."""
        return self.journal(number).stat().st_size if self.journal(number).exists() else 0

    def _start(self, number: int):
        given = (str(self._path), str(self.journal(number)), number, self._workers, self._users, str(self._stop))
        process = self._context.Process(target=live, args=given)
        process.start()
        return process

    @property
    def _stop(self) -> Path:
        return self._folder / "stop"

    def run(self, seconds: float, kill_every: float) -> list[str]:
        """Have the load for so long; what went wrong."""
        problems: list[str] = []
        processes = [self._start(number) for number in range(self._workers)]
        while not all(map(self._said, range(self._workers))) and not self._ended(processes):
            time.sleep(0.05)
        begin = time.monotonic()
        kill_at = begin + kill_every
        try:
            while time.monotonic() < begin + seconds and not problems:
                time.sleep(0.25)
                problems += self._ended(processes)
                self._look(processes[0])
                number = random.randrange(1, self._workers)
                if time.monotonic() >= kill_at and not problems and self._said(number) > self._before.get(number, 0):
                    self._before[number] = self._said(number)  # one that has not worked since is not killed again
                    processes[number].kill()
                    processes[number].join()
                    self.kills += 1
                    processes[number] = self._start(number)
                    kill_at = time.monotonic() + kill_every
            self._stop.touch()
            for number, process in enumerate(processes):
                process.join(120)
                if process.exitcode != 0:
                    problems.append(f"worker {number}: exit status {process.exitcode}")
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return problems

    def _ended(self, processes: list) -> list[str]:
        return [f"worker {number}: exit status {process.exitcode}; its error stands above"
                for number, process in enumerate(processes) if process.exitcode is not None]  # fmt: skip

    def _look(self, process) -> None:
        log = Path(f"{self._path}-wal")
        try:
            self.log = max(self.log, log.stat().st_size)
            self.held.append(resident(process.pid))
        except OSError:  # not there yet, or no more
            return
