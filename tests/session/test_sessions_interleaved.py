"""64 sessions on one model, their turns in any order, and in threads: each is as if it were alone."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from session_support import everything, recall_model

from deltamem_fast import MemorySession
from deltamem_fast.recall.task import draw_facts

pytestmark = pytest.mark.xdist_group("sessions_interleaved")  # what its tests share is made once

SESSIONS, TURNS = 64, 3


@pytest.fixture(scope="module")
def alone():
    """What each session says, and all of it after its turns, one session after another."""
    model, tokenizer = recall_model("msw")
    said, found = [], []
    for number in range(SESSIONS):
        chooser = random.Random(number)
        facts = draw_facts(chooser, 2, held_out=True)
        said.append([facts[0].statement(chooser), facts[1].statement(chooser), facts[0].question(chooser)])
        session = new_session(model, tokenizer, number)
        answers = [session.answer(text) for text in said[-1]]
        found.append((answers, everything(session)))
    assert len({answers[-1] for answers, _ in found}) > 20
    return said, found


def new_session(model, tokenizer, number):
    # Windows of different lengths, one of them without a limit
    return MemorySession(
        model, tokenizer, context_turns=(1, 2, None)[number % 3], generation={"max_new_tokens": 6}
    )  # fmt: skip


def test_interleaved_at_random_equals_alone_bit_for_bit(alone):
    said, found = alone
    model, tokenizer = recall_model("msw")
    sessions = [new_session(model, tokenizer, number) for number in range(SESSIONS)]
    order = [number for number in range(SESSIONS) for _ in range(TURNS)]
    random.Random(7).shuffle(order)
    answers = [[] for _ in range(SESSIONS)]
    for number in order:
        answers[number].append(sessions[number].answer(said[number][len(answers[number])]))
    for number, session in enumerate(sessions):
        assert (answers[number], everything(session)) == found[number], number


def test_in_threads_equals_alone_bit_for_bit(alone):
    said, found = alone
    model, tokenizer = recall_model("msw")

    def converse(number):
        session = new_session(model, tokenizer, number)
        return [session.answer(text) for text in said[number]], everything(session)

    with ThreadPoolExecutor(4) as pool:
        for number, result in enumerate(pool.map(converse, range(SESSIONS))):
            assert result == found[number], number


def test_two_open_iterators_do_not_meet(alone):
    said, found = alone
    model, tokenizer = recall_model("msw")
    sessions = [new_session(model, tokenizer, number) for number in range(8)]
    answers = [[] for _ in sessions]
    for turn in range(TURNS):
        streams = [session.send(said[number][turn]) for number, session in enumerate(sessions)]
        pieces = [[] for _ in streams]
        alive = list(range(len(streams)))
        while alive:  # a piece of each in turn
            for number in list(alive):
                piece = next(streams[number], None)
                if piece is None:
                    alive.remove(number)
                else:
                    pieces[number].append(piece)
        for number, parts in enumerate(pieces):
            answers[number].append("".join(parts))
    for number, session in enumerate(sessions):
        assert (answers[number], everything(session)) == found[number], number
