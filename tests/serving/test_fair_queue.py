"""Users take turns, what fits goes together, and nobody's own order is changed."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_fast.errors import StateError
from deltamem_fast.serving.fair_queue import FairQueue, QueueFullError, Worker


@dataclass
class Waits:
    owner: str
    fits: str | None = "x"
    ordered: bool = True
    number: int = 0
    size: int = 1
    abandoned: bool = False
    done: Future = field(default_factory=Future)


def test_owners_take_turns():
    queue = FairQueue(10, 100)
    for number, owner in enumerate("aaabbc"):
        queue.put(Waits(owner, number=number))
    assert [[job.number for job in queue.take(2)] for _ in range(3)] == [[0, 3], [5, 1], [4, 2]]
    assert len(queue) == 0


@given(
    jobs=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["x", "y", None]), st.booleans(), st.integers(1, 10)),
        max_size=24,
    ),
    most=st.integers(1, 6),
)
def test_what_is_taken_together_fits_and_nothing_is_lost(jobs, most):
    queue, taken = FairQueue(100, 8), []
    for number, (owner, fits, ordered, size) in enumerate(jobs):
        queue.put(Waits(owner, fits, ordered, number, size))
    while len(queue):
        waiting = {job.owner for line in queue._waiting.values() for job in line}
        batch = queue.take(most)
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or {job.fits for job in batch} == {batch[0].fits} != {None}
        assert len(batch) == 1 or len(batch) * max(job.size for job in batch) <= 8
        for place, job in enumerate(batch):  # after one that is ordered comes none of its owner's
            assert not job.ordered or job.owner not in {later.owner for later in batch[place + 1 :]}
        taken.append((waiting, batch))
    numbers = [job.number for _, batch in taken for job in batch]
    assert sorted(numbers) == list(range(len(jobs)))
    for owner in "abcd":
        own = [job.number for _, batch in taken for job in batch if job.owner == owner]
        assert own == sorted(own)
    # Whoever waits is first of a batch, or in one, before anybody else has been first twice.
    for place, (waiting, _) in enumerate(taken):
        for owner in waiting:
            firsts = []
            for _, batch in taken[place:]:
                if owner in {job.owner for job in batch}:
                    break
                firsts.append(batch[0].owner)
            assert len(firsts) == len(set(firsts))


def test_as_many_wait_as_may_and_none_when_it_is_closed():
    queue = FairQueue(2, 100)
    jobs = [Waits("a"), Waits("a")]
    for job in jobs:
        queue.put(job)
    with pytest.raises(QueueFullError, match="queue: 2 requests wait, which is as many as may"):
        queue.put(Waits("b"))
    assert queue.close() == jobs and queue.take(1) == []
    with pytest.raises(StateError, match="going down"):
        queue.put(Waits("b"))


def test_who_is_gone_is_dropped_and_keeps_no_place():
    queue = FairQueue(2, 100)
    jobs = [Waits("a"), Waits("b"), Waits("c")]
    for job in jobs[:2]:
        queue.put(job)
    jobs[0].abandoned = True
    queue.put(jobs[2])
    assert jobs[0].done.cancelled() and len(queue) == 2
    jobs[1].abandoned = True
    assert queue.take(4) == [jobs[2]] and jobs[1].done.cancelled() and len(queue) == 0


def test_a_worker_runs_what_is_put_and_ends():
    queue, ran, seen = FairQueue(9, 100), [], threading.Event()

    def run(jobs):
        ran.extend(jobs)
        if len(ran) == 3:
            seen.set()

    worker = Worker(queue, run, 2)
    jobs = [Waits(owner) for owner in "abc"]
    for job in jobs:
        queue.put(job)
    assert seen.wait(10) and ran == jobs
    queue.close()
    worker.join()
