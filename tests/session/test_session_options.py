"""Options that a session's methods hand on: what nobody knows is this package's error, before anything happens."""

import functools

import pytest
from session_support import everything, tiny_session
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import DeltaMemError, MemorySession, retrieve, revise


@functools.cache
def session():
    made = tiny_session(chatml_tokenizer(), generation={"max_new_tokens": 2})
    made.answer("My name is Ada.")
    return made


@pytest.mark.parametrize(
    "call, allowed",
    [
        (lambda **o: session().ingest("I keep bees.", **o), "tokens, trust, budget, progress"),
        (lambda **o: session().revise("I keep bees.", **o), "replaces, trust, budget, tokens, progress"),
        (lambda **o: session().answer("Hello.", **o), "generate, such as max_new_tokens"),
        (lambda **o: list(session().send("Hello.", **o)), "generate, such as max_new_tokens"),
        (lambda **o: session().retrieve("Who am I?", **o), "generate, such as max_new_tokens"),
        (lambda **o: retrieve(*of_session(), "Who am I?", **o), "generate, such as max_new_tokens"),
    ],
)
def test_an_option_that_nobody_knows_is_named(call, allowed):
    before = everything(session())
    with pytest.raises(DeltaMemError, match=f"^options: got 'unknown', allowed .*{allowed}") as caught:
        call(unknown=1)
    assert isinstance(caught.value, ValueError | TypeError) and everything(session()) == before
    with pytest.raises(DeltaMemError) as caught:
        call(**{"x" * 5000: 1})
    assert len(str(caught.value)) < 500


def of_session():
    return session().model, session().tokenizer, session().memory


def test_settings_of_generation_that_nobody_knows_are_named_when_the_session_is_made():
    with pytest.raises(DeltaMemError, match="^generation: got 'unknown'"):
        MemorySession(session().model, session().tokenizer, generation={"unknown": 1})


@pytest.mark.parametrize("name", ["model", "tokenizer", "template"])
def test_what_a_question_to_the_memory_cannot_have_of_its_own(name):
    with pytest.raises(DeltaMemError, match=f"^options: got {name}, which the session itself decides"):
        session().retrieve("Who am I?", **{name: {}})


def test_options_that_generate_knows_go_on():
    stop = {"stop_strings": ["zzz"], "tokenizer": session().tokenizer}
    for more in ({"output_hidden_states": True}, {"logits_processor": []}, {"trust_remote_code": None}, stop):
        session().answer("Hello.", **more)
    session().retrieve("Who am I?", stop_strings=["zzz"], top_k=5, unknown=None)


def test_revising_takes_the_options_of_ingest():
    model, tokenizer, memory = of_session()
    memory = memory.clone()
    assert revise(model, tokenizer, memory, "I keep bees. I live in Rome. I am Ada.", tokens=16).pieces > 1
    with pytest.raises(DeltaMemError, match="^tokens: got 0"):
        revise(model, tokenizer, memory, "I keep bees.", replaces="My name is Ada.", tokens=0)
