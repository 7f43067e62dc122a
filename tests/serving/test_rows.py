"""Rows of a batch: each as if it were alone, and as a session would have had its turn."""

import pytest
import torch
from serving_support import chat, greedy, row_of, served_model
from session_support import says
from support import relative_error
from tokenizers_for_tests import thinking_tokenizer

from deltamem_fast import MemorySession, MemoryState, memory_disabled
from deltamem_fast.serving.rows import answer_rows, answer_rows_from, can_be_padded, seeded
from deltamem_fast.session.turns import feed, new_cache

FIRST = [
    chat("Where did Ada go on Monday?"),
    chat("My dog is called Rex and my sister lives in Paris. What is the name of my dog?", system="Be kind!"),
    chat("The market."),
]
LATER = [
    chat("Where did Ada go?", "To the market.", "What is the name of my dog?"),
    chat("The train.", "She took it home; then she went.", "Ada?", system="Be kind!"),
    chat("A first.", "A second.", "A third.", "A fourth.", "Where did the user go on Monday?"),
]


def answered(model, tokenizer, chats, memory, known, **more):
    rows = [row_of(model, tokenizer, messages, most) for messages, most in zip(chats, (6, 3, 9))]
    after = answer_rows_from(model, rows, memory, known, greedy(model, tokenizer), **({"write": True} | more))
    return rows, after


@pytest.mark.parametrize("known", [False, True], ids=["all is new", "history is known"])
@pytest.mark.parametrize("strategy", ["tsw", "ssw", "ssw-message", "msw"])
def test_a_row_of_a_batch_is_as_if_it_were_alone(strategy, known):
    model, tokenizer = served_model(strategy)
    chats = LATER if known else FIRST
    if "ssw" in strategy:  # its rows have equally many messages, each with a system's or none
        chats = [[{"role": "system", "content": "Be kind!"}, *chats[n][-1:]] for n in range(3)]
    memory = MemoryState.zeros(model, 3)
    if known:
        _, memory = answered(model, tokenizer, [messages[-1:] for messages in FIRST], memory, False)
    before = memory.clone()
    rows, after = answered(model, tokenizer, chats, memory, known)
    assert all(torch.equal(memory[i], before[i]) for i in memory)
    for place, messages in enumerate(chats):
        alone = row_of(model, tokenizer, messages, rows[place].most)
        state = answer_rows_from(model, [alone], memory.select([place]), known, greedy(model, tokenizer), write=True)
        assert (alone.answer, alone.finish, alone.tokens) == (
            rows[place].answer, rows[place].finish, rows[place].tokens
        )  # fmt: skip
        assert alone.tokens <= alone.most and alone.finish in ("stop", "length")
        for i in state:
            assert relative_error(after[i][place], state[i][0]) < 1e-5
            assert not torch.equal(state[i][0], memory[i][place])


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "ssw-message", "msw"])
def test_a_turn_is_a_sessions(strategy):
    model, tokenizer = served_model(strategy)
    session = MemorySession(
        model, tokenizer, system="Be kind!", generation={"do_sample": False, "max_new_tokens": 6}, context_turns=1
    )
    memory, known = MemoryState.zeros(model), False
    for said in ("My dog is called Rex.", "Where did Ada go?"):
        # A session keeps one turn in sight; so does a client that sends its new message alone.
        row = row_of(model, tokenizer, chat(said, system="Be kind!"))
        memory = answer_rows_from(model, [row], memory, known, greedy(model, tokenizer), write=True)
        assert session.answer(said) == row.answer
        assert all(relative_error(memory[i], session.memory[i]) < 1e-5 for i in memory)
        known = True


def test_what_was_read_before_is_in_sight_and_not_written_again():
    model, tokenizer = served_model()
    _, memory = answered(model, tokenizer, FIRST[:1], MemoryState.zeros(model), False)
    again = [*FIRST[0], {"role": "assistant", "content": "Home."}, {"role": "user", "content": "Ada?"}]
    row = row_of(model, tokenizer, again)
    after = answer_rows_from(model, [row], memory, True, greedy(model, tokenizer), write=True)
    # By hand: history under a frozen memory, the question, and the answer as the template shows it.
    cache, state = new_cache(model), memory.clone()
    state.frozen = True
    for block in (row.prompt.preamble, *row.prompt.earlier):
        feed(model, cache, state, block)
    state.frozen = False
    for block in (*row.prompt.new, row.prompt.answer(row.message())):
        feed(model, cache, state, block)
    assert all(relative_error(after[i], state[i]) < 1e-5 for i in state)


def test_reading_changes_nothing_and_none_is_the_bare_model():
    model, tokenizer = served_model()
    _, memory = answered(model, tokenizer, FIRST, MemoryState.zeros(model, 3), False)
    before = memory.clone()
    rows, after = answered(model, tokenizer, LATER, memory, True, write=False)
    assert after is memory and all(torch.equal(memory[i], before[i]) for i in memory)
    written, _ = answered(model, tokenizer, LATER, memory, True)
    bare = [row_of(model, tokenizer, messages) for messages in LATER]
    answer_rows(model, bare, greedy(model, tokenizer))
    for row in bare:
        ids = torch.tensor([row.prompt.whole.ids])
        with memory_disabled(model):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert row._stream.ids == out[0, ids.shape[1] :].tolist()
    assert [row.answer for row in rows] != [row.answer for row in bare]
    assert len(written) == 3


def test_an_empty_answer_is_written_beside_others():
    """A template may show nothing of an answer without text: that row is left as it is, the others are not."""
    model, tokenizer = served_model()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- for m in messages -%}", "{%- for m in messages if m.content -%}"
    )
    rows = [row_of(model, tokenizer, messages, 4) for messages in FIRST]
    end = tokenizer.eos_token_id

    def ends_at_once(input_ids, scores):
        scores[1] = -float("inf")
        scores[1, end] = 0.0
        return scores

    options = greedy(model, tokenizer) | {"eos_token_id": [end]}
    memory = MemoryState.zeros(model, 3)
    memory.name_rows((name, 1, "a bank") for name in "abc")
    after = answer_rows_from(model, rows, memory, False, options | {"logits_processor": [ends_at_once]}, write=True)
    assert rows[1].answer == "" and not rows[1].block().ids and rows[0].answer and rows[2].answer
    assert after.ids == ["a", "b", "c"]
    for place in (0, 2):
        alone = row_of(model, tokenizer, FIRST[place], 4)
        state = answer_rows_from(model, [alone], MemoryState.zeros(model), False, options, write=True)
        assert all(relative_error(after[i][place], state[i][0]) < 1e-5 for i in state)
    cache, state = new_cache(model), MemoryState.zeros(model)
    for block in rows[1].prompt.all_blocks:
        feed(model, cache, state, block)
    assert all(relative_error(after[i][1], state[i][0]) < 1e-5 for i in state)


def test_an_answer_ends_at_a_stop_and_what_follows_is_not_remembered():
    model, tokenizer = served_model()
    whole = row_of(model, tokenizer, FIRST[0], 12)
    answer_rows_from(model, [whole], MemoryState.zeros(model), False, greedy(model, tokenizer), write=True)
    stop = whole.answer[3:5]
    heard = []
    row = row_of(model, tokenizer, FIRST[0], 12, stops=(stop,), say=lambda piece, thinking: heard.append(piece))
    after = answer_rows_from(model, [row], MemoryState.zeros(model), False, greedy(model, tokenizer), write=True)
    assert row.answer == whole.answer[: whole.answer.index(stop)] == "".join(heard)
    assert row.finish == "stop" and row.tokens < whole.tokens
    cache, state = new_cache(model), MemoryState.zeros(model)
    for block in (
        row.prompt.preamble,
        *row.prompt.new,
        row.prompt.answer({"role": "assistant", "content": row.answer}),
    ):
        feed(model, cache, state, block)
    assert all(relative_error(after[i], state[i]) < 1e-5 for i in state)


def test_thinking_is_apart_and_not_remembered():
    model, _ = served_model()
    tokenizer = thinking_tokenizer()
    heard = {True: "", False: ""}

    def say(piece, thinking):
        heard[thinking] += piece

    row = row_of(model, tokenizer, FIRST[0], 200, say=say)
    options = greedy(model, tokenizer) | says(tokenizer, "<think>\nWhere?\n</think>\n\nThe market.")
    after = answer_rows_from(model, [row], MemoryState.zeros(model), False, options, write=True)
    assert (row.thinking, row.answer) == (heard[True], heard[False]) == ("Where?", "The market.")
    session = MemorySession(model, tokenizer, generation={"do_sample": False})
    session.answer(FIRST[0][0]["content"], **says(tokenizer, "<think>\nWhere?\n</think>\n\nThe market."))
    assert all(relative_error(after[i], session.memory[i]) < 1e-5 for i in after)


def test_a_seed_decides_and_leaves_the_generator_alone():
    model, tokenizer = served_model()
    options = greedy(model, tokenizer) | {"do_sample": True, "temperature": 1.5}
    found = []
    for seed in (1, 1, 2):
        before = torch.random.get_rng_state()
        row = row_of(model, tokenizer, FIRST[0], 12)
        with seeded(seed, torch.device("cpu")):
            answer_rows(model, [row], options)
        assert torch.equal(before, torch.random.get_rng_state())
        found.append(row.answer)
    assert found[0] == found[1] != found[2]


def test_a_window_of_columns_is_not_padded():
    assert can_be_padded(served_model()[0]) and not can_be_padded(served_model(family="mistral")[0])
