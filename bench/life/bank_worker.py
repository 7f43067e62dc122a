"""A process that uses a bank until it is told to stop, or killed: what it says in its journal, the bank must hold.

User n belongs to the worker n % W: what is written under it follows from n and the write's mark. Each operation is in
the journal before it begins and once it has been acknowledged. A few ids are everybody's: each worker counts them up.
"""

from __future__ import annotations

import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from deltamem_fast import BankConflict, MemoryBank, MemoryState

from ..memory.bank import backbone, name_of

BATCH = 64  # ids of an operation
SHARED = 8  # ids that all workers count up
GONE = -1  # the mark of a user that is not there
_HEAD = struct.Struct("<cqI")  # kind, mark, how many users follow
# What an operation's record begins with; then comes one that says how it ended.
WRITE, DELETE, COUNT = b"w", b"d", b"c"
DONE, NOT_DONE, UNKNOWN = b"+", b"-", b"?"


class LostError(Exception):
    """The bank does not hold what it has acknowledged."""


def memories(model, users: np.ndarray, marks: np.ndarray) -> MemoryState:
    """The memories that are written under ``users`` with ``marks``, int64 [B] both: numbers from −1 to 1, 0 in none."""
    made = MemoryState.zeros(model, len(users))
    count = sum(state[0].numel() for _, state in made.items())
    seeds = (users.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + marks.astype(np.uint64)) * np.uint64(
        0xD1B54A32D192ED03
    )
    seeds = (seeds >> np.uint64(32)).astype(np.uint32)
    x = (seeds[:, None] ^ np.arange(count, dtype=np.uint32)) * np.uint32(0x9E3779B1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA6B)
    numbers = ((x >> np.uint32(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23) - np.float32(1)
    start = 0
    for _, state in made.items():
        width = state[0].numel()
        state.copy_(torch.from_numpy(numbers[:, start : start + width]).view(state.shape))
        start += width
    return made


def model_of_all():
    """The model of the bank, the same in each process: a bank knows its adapter by its weights."""
    torch.manual_seed(0)
    return backbone()


@dataclass
class Truth:
    """What a worker's users must be, by its journal.

    Attributes:
        marks: of user number·W + w, ``GONE`` where there is none.
        doubt: an operation that was begun and not answered: kind, mark, users; None: there is none.
        counted, uncertain: of each shared id, how often it was counted up, and how often that is unknown.
        operations: how many of each kind were acknowledged.
    """

    marks: np.ndarray
    doubt: tuple[bytes, int, np.ndarray] | None = None
    counted: np.ndarray = field(default_factory=lambda: np.zeros(SHARED, np.int64))
    uncertain: np.ndarray = field(default_factory=lambda: np.zeros(SHARED, np.int64))
    operations: dict[bytes, int] = field(default_factory=lambda: dict.fromkeys((WRITE, DELETE, COUNT), 0))

    def take(self, kind: bytes, mark: int, users: np.ndarray, workers: int) -> None:
        """One record of the journal."""
        if kind in (WRITE, DELETE, COUNT):
            self.doubt = kind, mark, users
            return
        begun, mark, users = self.doubt
        self.doubt = None
        if begun == COUNT:
            self.counted[users] += kind == DONE
            self.uncertain[users] += kind == UNKNOWN
        elif kind == DONE:
            self.marks[users // workers] = mark if begun == WRITE else GONE
        self.operations[begun] += kind == DONE


def truth_of(journal: Path, number: int, workers: int, users: int) -> Truth:
    """What a journal says of a bank that was filled with ``users``, each of mark 0. A last, cut record is none.

    Returns:
        The truth, with room for a quarter more users than there were.
    """
    most = users + max(users // 4, 4 * BATCH * workers)
    own = np.arange(number, most, workers)
    truth = Truth(np.where(own < users, 0, GONE).astype(np.int64))
    data, at = journal.read_bytes() if journal.exists() else b"", 0
    while at + _HEAD.size <= len(data):
        kind, mark, count = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + 8 * count
        if end > len(data):
            break
        truth.take(kind, mark, np.frombuffer(data, np.int64, count, at + _HEAD.size), workers)
        at = end
    if at < len(data):
        os.truncate(journal, at)
    return truth


def check(bank: MemoryBank, model, users: np.ndarray, marks: np.ndarray) -> bool:
    """Whether the bank holds of ``users`` exactly what was written with ``marks``, and nothing where they are GONE."""
    found = bank.gather(name_of(int(user)) for user in users)
    there = np.array([row[1] > 0 for row in found.bank_rows])
    if (there != (marks != GONE)).any():
        return False
    wanted = memories(model, users, marks)
    held = torch.from_numpy(there)
    return all(torch.equal(state[held], wanted[i][held]) for i, state in found.items())


def shared_name(place: int) -> str:
    """The id that all count up."""
    return f"shared-{place}"


class Worker:
    """One life of a worker: it goes on where the one before it was killed."""

    def __init__(self, path: Path, journal: Path, number: int, workers: int, users: int):
        torch.set_num_threads(1)
        self.model = model_of_all()
        self.number, self.workers = number, workers
        self.truth = truth_of(journal, number, workers, users)
        self.journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.draw = random.Random(os.urandom(8))
        self.bank = MemoryBank(path, self.model)

    def say(self, kind: bytes, mark: int = 0, users: np.ndarray | None = None) -> None:
        """Put a record into the journal."""
        users = np.zeros(0, np.int64) if users is None else users
        record = _HEAD.pack(kind, mark, len(users)) + users.tobytes()
        if os.write(self.journal, record) != len(record):
            raise OSError("the journal could not be written")
        self.truth.take(kind, mark, users, self.workers)

    def own(self, gone: bool = False) -> np.ndarray:
        """Some users of this worker, sorted, int64 [≤ BATCH]: such as are there, or such as are not."""
        marks = self.truth.marks
        drawn = np.unique(np.array(self.draw.choices(range(len(marks)), k=2 * BATCH)))
        kept = drawn[(marks[drawn] == GONE) == gone][:BATCH]
        return kept.astype(np.int64) * self.workers + self.number

    def marks_of(self, users: np.ndarray) -> np.ndarray:
        """The marks that they must have."""
        return self.truth.marks[users // self.workers]

    def verify(self, users: np.ndarray) -> None:
        """Raise LostError unless the bank holds what it must."""
        if not check(self.bank, self.model, users, self.marks_of(users)):
            raise LostError(f"of {name_of(int(users[0]))} and others: not what was acknowledged")

    def settle(self) -> None:
        """See what became of the operation that a kill cut off: it was done wholly, or not at all."""
        if self.truth.doubt is None:
            return
        kind, mark, users = self.truth.doubt
        if kind == COUNT:
            self.say(UNKNOWN)
            return
        after = np.full(len(users), mark if kind == WRITE else GONE)
        if check(self.bank, self.model, users, self.marks_of(users)):
            self.say(NOT_DONE)
        elif check(self.bank, self.model, users, after):
            self.say(DONE)
        else:
            raise LostError(f"of {name_of(int(users[0]))} and others: a part of what was cut off")

    def write(self, users: np.ndarray) -> None:
        """Commit new memories under users, whether they are there or not."""
        mark = self.draw.randrange(1, 2**40)
        memory = self.bank.gather(name_of(int(user)) for user in users)
        for i, state in memories(self.model, users, np.full(len(users), mark)).items():
            memory[i].copy_(state)
        self.say(WRITE, mark, users)
        self.bank.commit(memory.ids, memory)
        self.say(DONE)

    def delete(self, users: np.ndarray) -> None:
        """Delete users that are there."""
        self.say(DELETE, 0, users)
        if self.bank.delete([name_of(int(user)) for user in users]) != len(users):
            raise LostError(f"of {name_of(int(users[0]))} and others: some were gone")
        self.say(DONE)

    def count(self) -> None:
        """Count a shared id up, against everybody else."""
        place = self.draw.randrange(SHARED)
        while True:
            memory = self.bank.gather([shared_name(place)])
            for _, state in memory.items():
                state += 1
            self.say(COUNT, 0, np.array([place]))
            try:
                self.bank.commit(memory.ids, memory)
            except BankConflict:
                self.say(NOT_DONE)
                continue
            self.say(DONE)
            return

    def step(self) -> None:
        """One operation of the mixed load."""
        chance = self.draw.random()
        if chance < 0.55:
            users = self.own()
            if len(users):
                self.verify(users)
        elif chance < 0.75:
            users = self.own()
            if len(users):
                self.write(users)
        elif chance < 0.85:
            users = self.own(gone=True)
            if len(users):
                self.write(users)
        elif chance < 0.93:
            users = self.own()[: BATCH // 2]
            if len(users):
                self.delete(users)
        elif chance < 0.98:
            self.count()
        else:
            self.bank.list(prefix=f"user-{self.draw.randrange(256):02x}", limit=100)
            len(self.bank)


def live(path: str, journal: str, number: int, workers: int, users: int, stop: str) -> None:
    """Use the bank until the file ``stop`` is there; an error ends the process with status 1."""
    worker = Worker(Path(path), Path(journal), number, workers, users)
    worker.settle()
    while not os.path.exists(stop):
        worker.step()
    worker.bank.close()
