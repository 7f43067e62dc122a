"""What moved a session's memory how far: trust by role, budgets, the audit, and going back to a turn."""

import json

import pytest
import torch
from session_support import change_manifest, state_bits, tiny_session
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import DeltaMemError, MemorySession, MemoryState, ingest, revise
from deltamem_fast.memory.trusting import hold_back, moved
from deltamem_fast.session.audit import KEPT, Audit, Move

STRATEGIES = ["tsw", "ssw", "msw"]
NEW = {"max_new_tokens": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def session_of(tokenizer, strategy="tsw", **settings) -> MemorySession:
    return tiny_session(tokenizer, strategy, generation=NEW, **settings)


# --- a memory held back


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ingest_goes_a_share_of_the_way(tokenizer, strategy):
    session = session_of(tokenizer, strategy)
    model, before = session.model, MemoryState.zeros(session.model)
    ingest(model, tokenizer, before, "My name is Ada. I keep bees.")
    whole, part, none = before.clone(), before.clone(), before.clone()
    ingest(model, tokenizer, whole, "I keep goats. I live in Rome.")
    told = ingest(model, tokenizer, part, "I keep goats. I live in Rome.", trust=0.25)
    assert ingest(model, tokenizer, none, "I keep goats.", trust=0.0).moved == 0.0
    assert state_bits(none) == state_bits(before)
    assert 0 < told.moved == moved(before, part) < moved(before, whole)
    for layer in before:
        # Under the guard that less than whole trust brings (a loud adapter's gates reach it).
        assert (part[layer] - before[layer]).norm() < 0.3 * (whole[layer] - before[layer]).norm()


@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_a_budget_is_kept_head_by_head_however_long_the_text(tokenizer, budget):
    session = session_of(tokenizer, "msw")
    memory = MemoryState.zeros(session.model)
    ingest(session.model, tokenizer, memory, "My name is Ada.")
    before = memory.clone()
    ingest(session.model, tokenizer, memory, "I keep goats. " * 40, tokens=64, budget=budget)
    for layer in memory:
        apart = (memory[layer] - before[layer]).norm(dim=(-2, -1))
        assert (apart > 0).all()
    report = memory.diff(before)
    assert all(row.relative <= budget * 1.0001 for row in report) and len(report) == 4
    far = memory.clone()
    ingest(session.model, tokenizer, far, "I keep goats. " * 40, tokens=64, budget=1e9)
    assert moved(before, far) > moved(before, memory)


def test_hold_back_is_exact_at_its_ends_and_takes_the_lesser_of_both():
    old, new = {0: torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])}, torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]]])
    for trust, budget, wanted in (
        (1.0, None, 0.0),
        (0.0, None, 5.0),
        (0.5, None, 2.5),
        (0.5, 0.1, 4.5),
        (0.05, 0.1, 4.75),
    ):
        memory = MemoryState({0: new.clone()})
        hold_back(memory, old, trust, budget)
        assert memory[0].norm().item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"trust": 1.5}, {"trust": "x"}, {"budget": 0}, {"budget": -1.0}, {"budget": float("nan")}]
)
def test_what_is_no_trust_or_budget_is_refused_and_nothing_written(tokenizer, wrong):
    session = session_of(tokenizer)
    memory = MemoryState.zeros(session.model)
    with pytest.raises(DeltaMemError, match=next(iter(wrong))):
        ingest(session.model, tokenizer, memory, "I keep goats.", **wrong)
    assert state_bits(memory) == state_bits(MemoryState.zeros(session.model))
    with pytest.raises(DeltaMemError, match=next(iter(wrong))):
        session_of(tokenizer, **({"trust": {"user": wrong["trust"]}} if "trust" in wrong else wrong))


def test_diff_wants_a_memory(tokenizer):
    memory = MemoryState.zeros(session_of(tokenizer).model)
    with pytest.raises(DeltaMemError, match="other: got int"):
        memory.diff(1)
    assert all(row.distance == 0 for row in memory.diff(memory.clone()))


# --- sessions


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_roles_that_are_not_trusted_leave_the_memory_as_it_was(tokenizer, strategy):
    session = session_of(tokenizer, strategy, trust={"user": 0.0, "assistant": 0.0, "system": 0.0, "tool": 0.0})
    session.answer("My name is Ada.")
    assert state_bits(session.memory) == state_bits(MemoryState.zeros(session.model))
    half = session_of(tokenizer, strategy, trust={"user": 0.5})
    whole = session_of(tokenizer, strategy)
    half.answer("My name is Ada."), whole.answer("My name is Ada.")
    moves = [move for move in half.audit() if move.source == "user"]
    assert moves and moves[0].trust == 0.5 and state_bits(half.memory) != state_bits(whole.memory)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_session_with_trust_goes_on_from_its_files_to_the_bit(tokenizer, strategy, tmp_path):
    settings = {"trust": {"user": 0.5, "assistant": 0.25}, "budget": 0.8, "context_turns": 2, "history": 7}
    session = session_of(tokenizer, strategy, **settings)
    for text in ("My name is Ada.", "I keep bees.", "I live in Rome."):
        session.answer(text)
    session.ingest("Ada likes tea.", trust=0.5, source="notes.txt")
    session.save(tmp_path / "ada", cache=False)
    again = MemorySession.load(tmp_path / "ada", session.model, tokenizer)
    assert (again.trust, again.budget, again.limits) == (session.trust, session.budget, session.limits)
    assert again.audit() == session.audit() and "ingest: notes.txt" in str(again.audit())
    assert again.answer("Who am I?") == session.answer("Who am I?")
    assert state_bits(again.memory) == state_bits(session.memory)


def test_the_audit_says_which_message_moved_the_memory_how_far_and_stays_small(tokenizer):
    session = session_of(tokenizer)
    assert str(session.audit()) == "nothing has moved the memory"
    session.answer("My name is Ada.")
    session.answer("I keep bees.")
    session.ingest("Ada likes tea.")
    session.forget("Ada likes tea.")
    audit = session.audit()
    assert [move.source for move in audit] == ["user", "assistant"] * 2 + ["ingest", "forget"]
    assert [move.message for move in audit] == [0, 1, 2, 3, None, None]
    assert [move.turn for move in audit] == [0, 0, 1, 1, 2, 2] and all(0 < move.moved <= 2 for move in audit)
    assert audit.moves[0].moved == pytest.approx(1.0)  # from an empty memory
    assert audit.largest(1).moves[0].moved == max(move.moved for move in audit)
    long = Audit().with_moves(*[Move(n, "user", n, 1, 1.0, 0.1) for n in range(KEPT + 10)])
    assert len(long) == KEPT and long.dropped == 10 and "10 earlier moves are not kept" in str(long)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rollback_is_as_if_the_later_turns_had_not_been_had(tokenizer, strategy):
    session = session_of(tokenizer, strategy, context_turns=3)
    texts = ["My name is Ada.", "I keep bees.", "I live in Rome.", "I like tea."]
    states = [state_bits(session.memory)]
    for text in texts:
        session.answer(text)
        states.append(state_bits(session.memory))
    session.ingest("Ada likes tea.")
    session.rollback(4)  # the end of the last turn, before the text was told
    assert session.turns == 4 and state_bits(session.memory) == states[4]
    session.rollback(2)
    assert session.turns == 2 and state_bits(session.memory) == states[2] and len(session.messages) == 4
    assert [move.turn for move in session.audit()] == [0, 0, 1, 1]
    fresh = session_of(tokenizer, strategy, context_turns=3)
    for text in texts[:2]:
        fresh.answer(text)
    assert session.answer(texts[2]) == fresh.answer(texts[2])
    session.rollback(0)
    assert session.turns == 0 and session.messages == [] and state_bits(session.memory) == states[0]
    assert session.answer(texts[0]) and state_bits(session.memory) == states[1]


def test_rollback_says_how_far_it_can_go(tokenizer):
    session = session_of(tokenizer, history=2)
    for text in ("a b", "c d", "e f"):
        session.answer(text)
    with pytest.raises(DeltaMemError, match="turns: got 0, allowed 1 to 3"):
        session.rollback(0)
    with pytest.raises(DeltaMemError, match="turns: got -1"):
        session.rollback(-1)
    session.forget("c d")
    with pytest.raises(DeltaMemError, match="allowed 3 to 3"):  # it would bring back what was forgotten
        session.rollback(2)
    assert session.turns == 3


@pytest.mark.parametrize(
    "field, value",
    [
        (("settings", "trust"), {"user": 2}), (("settings", "trust"), {"nobody": 1}), (("settings", "budget"), 0),
        (("settings", "history"), -1), (("audit", "dropped"), -1), (("audit", "moves"), [[0, "user", 0, 1, 1.0]]),
        (("audit", "moves"), [[0, "user", 0, 1, 2.0, 0.5]]), (("audit", "moves"), [[0, "user", 0, 1, 1.0, "x"]]),
    ],
)  # fmt: skip
def test_files_with_other_trust_or_audits_are_refused(tokenizer, tmp_path, field, value):
    session = session_of(tokenizer)
    session.answer("My name is Ada.")
    session.save(tmp_path / "ada", cache=False)

    def change(manifest):
        manifest[field[0]][field[1]] = value

    change_manifest(tmp_path / "ada", change)
    with pytest.raises(DeltaMemError, match=field[1] if field[0] == "settings" else "audit"):
        MemorySession.load(tmp_path / "ada", session.model, tokenizer)


def test_an_audit_is_json(tokenizer):
    session = session_of(tokenizer)
    session.answer("My name is Ada.")
    assert json.loads(json.dumps(session.audit().to_dict()))["dropped"] == 0


def test_rollback_takes_back_what_was_told_between_turns_and_the_audit_says_so(tokenizer):
    session = session_of(tokenizer, system="Be kind.")
    session.answer("My name is Ada.")
    first, audit = state_bits(session.memory), session.audit()
    assert [move.source for move in audit] == ["system", "user", "assistant"]
    session.ingest("I keep goats.", source="crm")
    session.answer("Hello.")
    session.rollback(1)
    assert state_bits(session.memory) == first and session.audit() == audit
    session.ingest("I keep goats.")
    session.rollback(1)
    assert state_bits(session.memory) == first and session.answer("Hello.")


def test_a_loaded_session_rolls_back_to_what_was_loaded_and_may_be_trusted_otherwise(tokenizer, tmp_path):
    session = session_of(tokenizer, trust={"user": 0.5})
    session.answer("My name is Ada.")
    session.save(tmp_path / "ada", cache=False)
    again = MemorySession.load(tmp_path / "ada", session.model, tokenizer, trust={"user": 0.25}, budget=0.5)
    assert (again.trust, again.budget) == ({"user": 0.25}, 0.5)
    before = state_bits(again.memory)
    again.answer("I keep bees.")
    assert [move.trust for move in again.audit() if move.source == "user"] == [0.5, 0.25]
    again.rollback(1)
    assert state_bits(again.memory) == before
    with pytest.raises(AttributeError):
        again.budget = 1.0


def test_a_loaded_session_keeps_its_history_unless_another_is_given(tokenizer, tmp_path):
    session = session_of(tokenizer, history=1)
    session.answer("My name is Ada.")
    session.save(tmp_path / "ada", cache=False)

    def load(**given):
        return MemorySession.load(tmp_path / "ada", session.model, tokenizer, **given)

    for given, allowed in (({}, "2 to 3"), ({"history": 2}, "1 to 3"), ({"history": 0}, "none")):
        again = load(**given)
        again.answer("I keep bees."), again.answer("I live in Rome.")
        with pytest.raises(DeltaMemError, match=f"turns: got 0, allowed {allowed}:"):
            again.rollback(0)
    again.save(tmp_path / "other", cache=False)
    again = MemorySession.load(tmp_path / "other", session.model, tokenizer)
    with pytest.raises(DeltaMemError, match="allowed none:"):
        again.rollback(3)
    for wrong in (-1, "x", True, 2**40):
        with pytest.raises(DeltaMemError, match="^history: got"):
            load(history=wrong)


def test_a_budget_counts_what_was_there_not_what_comes(tokenizer):
    model = session_of(tokenizer).model
    memory = MemoryState.zeros(model)
    ingest(model, tokenizer, memory, "My name is Ada.", trust=0.01)
    assert 0 < ingest(model, tokenizer, memory, "I keep goats. I live in Rome.", budget=0.2).moved <= 0.2001
    session = session_of(tokenizer, budget=0.2)
    session.answer("My name is Ada.")  # an empty memory takes it whole
    assert session.ingest("I keep goats.").moved <= 0.2001
    assert session.ingest("I live in Rome, near the river.", budget=9.0).moved > 0.2001


def test_huge_states_leave_neither_nan_in_a_memory_nor_in_an_audit(tokenizer, tmp_path):
    memory = MemoryState.zeros(session_of(tokenizer).model)
    for layer in memory:
        memory[layer].fill_(1e30)
    session = session_of(tokenizer, memory=memory, budget=0.5, trust={"user": 0.5})
    session.answer("My name is Ada.")
    session.ingest("I keep goats.", trust=0.5)
    assert all(state.isfinite().all() for _, state in session.memory.items())
    assert all(0 <= move.moved <= 2 for move in session.audit())
    session.save(tmp_path / "ada")


def test_revising_with_less_trust_erases_with_less_too(tokenizer):
    model = session_of(tokenizer).model
    memory = MemoryState.zeros(model)
    ingest(model, tokenizer, memory, "I keep goats.")
    before = state_bits(memory)
    assert revise(model, tokenizer, memory, "I keep bees.", replaces="I keep goats.", trust=0.0).moved == 0.0
    assert state_bits(memory) == before
    whole, held = (memory.clone() for _ in range(2))
    far = revise(model, tokenizer, whole, "I keep bees.", replaces="I keep goats.").moved
    assert far > revise(model, tokenizer, held, "I keep bees.", replaces="I keep goats.", budget=0.1).moved > 0


def test_an_audit_from_a_file_cannot_act_upon_a_terminal(tokenizer, tmp_path):
    session = session_of(tokenizer)
    session.answer("My name is Ada.")
    session.save(tmp_path / "ada", cache=False)
    change_manifest(tmp_path / "ada", lambda manifest: manifest["audit"]["moves"][0].__setitem__(1, "\x1b]0;x\x07"))
    with pytest.raises(DeltaMemError, match="audit"):
        MemorySession.load(tmp_path / "ada", session.model, tokenizer)
