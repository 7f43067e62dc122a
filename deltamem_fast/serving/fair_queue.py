"""Work for one thread, fairly: users take turns, and whose requests fit together go through the model together."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Protocol

from ..errors import StateError


class QueueFullError(StateError):
    """As many requests wait as may."""


class Job(Protocol):
    """What waits.

    Attributes:
        owner: users take turns by it.
        fits: jobs of equal ``fits`` may go together; None: with no other.
        ordered: it goes together with no other of its owner's, which come after it.
        size: tokens; those of jobs that go together are padded to the longest.
        abandoned: nobody waits for it any more; it is dropped, and its ``done`` cancelled.
    """

    owner: Hashable
    fits: Hashable | None
    ordered: bool
    size: int
    abandoned: bool
    done: Future


class FairQueue:
    """Jobs of many owners, who take turns; an owner's own in the order of arrival.

    Args:
        most: jobs that may wait.
        tokens: of jobs that go together, the longest times how many they are; a longer one goes alone.
    """

    def __init__(self, most: int, tokens: int):
        self._most, self._tokens = most, tokens
        self._waiting: OrderedDict[Hashable, deque[Job]] = OrderedDict()  # owners in the order of their turns
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def put(self, job: Job) -> None:
        """Let a job wait.

        Raises:
            QueueFullError: as many wait as may.
            StateError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise StateError("server: is going down, and takes nothing more")
            if self._count >= self._most:
                self._drop_abandoned()
            if self._count >= self._most:
                raise QueueFullError(f"queue: {self._most} requests wait, which is as many as may; try again later")
            self._waiting.setdefault(job.owner, deque()).append(job)
            self._count += 1
            self._changed.notify()

    def take(self, most: int) -> list[Job]:
        """The next jobs that go together, at most ``most``; [] when the queue is closed.

        The first is that of the owner whose turn it is: it waits for no batch that would fit others better.
        """
        with self._changed:
            while True:
                while not self._count and not self._closed:
                    self._changed.wait()
                self._drop_abandoned()
                if self._count or self._closed:
                    break
            taken: list[Job] = []
            owners = list(self._waiting)
            while owners and len(taken) < most:
                # One of each; then another of those whose jobs need not wait for each other.
                owners = [owner for owner in owners if self._take_one(owner, taken, most)]
            self._count -= len(taken)
            return taken

    def _take_one(self, owner: Hashable, taken: list[Job], most: int) -> bool:
        """Take the owner's next job, if it goes with those that are taken; whether another of theirs may."""
        jobs = self._waiting.get(owner)
        if not jobs or len(taken) >= most:
            return False
        job = jobs[0]
        if taken and (job.fits is None or job.fits != taken[0].fits):
            return False
        if taken and max(job.size, *(other.size for other in taken)) * (len(taken) + 1) > self._tokens:
            return False
        taken.append(jobs.popleft())
        # Behind the others: its next one has to wait for theirs.
        self._waiting.move_to_end(owner)
        if not jobs:
            del self._waiting[owner]
        return not job.ordered and job.fits is not None

    def _drop_abandoned(self) -> None:
        for owner, jobs in list(self._waiting.items()):
            left = deque(job for job in jobs if not job.abandoned)
            for job in jobs if len(left) < len(jobs) else ():
                if job.abandoned:
                    job.done.cancel()
            self._count -= len(jobs) - len(left)
            if left:
                self._waiting[owner] = left
            else:
                del self._waiting[owner]

    def close(self) -> list[Job]:
        """Take nothing more; the jobs that waited."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._count = 0
            self._changed.notify_all()
            return left


class Worker:
    """A thread that runs the jobs of a queue.

    Args:
        queue: where they wait.
        run: does jobs that go together, and tells each what came of it; it does not raise.
        most: jobs that go together at most.
    """

    def __init__(self, queue: FairQueue, run: Callable[[Sequence[Job]], None], most: int):
        self._queue, self._run, self._most = queue, run, most
        self._thread = threading.Thread(target=self._work, name="deltamem-serve", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while jobs := self._queue.take(self._most):
            self._run(jobs)

    @property
    def alive(self) -> bool:
        """Whether jobs are run."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until the jobs under way are done; the queue is closed."""
        self._thread.join()
