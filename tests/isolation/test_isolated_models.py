"""A row's logits, answer and memory do not depend on its neighbours: bit-equal at equal shapes, else to last bits."""

import numpy as np
import pytest
import torch
from serving_support import chat, engine_of, greedy, row_of, served_model
from session_support import CONFIGS, says
from support import loud_adapter, relative_error, tiny_model

from deltamem_fast import MemoryBank, MemoryState, patch_model
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.model.continuous import Requests
from deltamem_fast.serving.rows import answer_rows_from
from deltamem_fast.vllm.advance import advance_blocks
from deltamem_fast.vllm.plan import make_plan
from deltamem_kernels.dispatch import operations
from deltamem_kernels.rule import DeltaRule

OURS = 1
LAST_BITS = 1e-5  # relative, what another batch's shape may change; about 1e-6 was measured


def filled(model, rows: int, seed: int = 0) -> MemoryState:
    memory = MemoryState.zeros(model, rows)
    make = torch.Generator().manual_seed(seed)
    for _, state in memory.items():
        state.copy_(torch.randn(state.shape, generator=make))
    return memory


def beside(memory: MemoryState, seed: int) -> MemoryState:
    """Our row among others."""
    changed = filled_like(memory, seed)
    for i, state in changed.items():
        state[OURS] = memory[i][OURS]
    return changed


def filled_like(memory: MemoryState, seed: int) -> MemoryState:
    changed, make = memory.clone(), torch.Generator().manual_seed(seed)
    for _, state in changed.items():
        state.copy_(5 * torch.randn(state.shape, generator=make))
    return changed


def same_row(one: MemoryState, other: MemoryState) -> None:
    for i in one:
        assert torch.equal(one[i][OURS], other[i][OURS])


@pytest.fixture(params=["reference", "numba"])
def model(request):
    return loud_adapter(patch_model(tiny_model(), CONFIGS["msw"], backend=request.param))


@torch.no_grad()
def test_forward_and_decode(model):
    ids, mask = torch.randint(3, 128, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[:, :2] = torch.tensor([[1, 1], [0, 0], [0, 1]])
    others, other_mask = torch.randint(3, 128, (3, 9)), mask.flip(0)
    others[OURS], other_mask[OURS] = ids[OURS], mask[OURS]
    one = filled(model, 3)
    two, alone = beside(one, 7), one.select([OURS])
    a = model(ids, attention_mask=mask, memory=one)
    b = model(others, attention_mask=other_mask, memory=two)
    c = model(ids[OURS, None], attention_mask=mask[OURS, None], memory=alone)
    assert torch.equal(a.logits[OURS, 2:], b.logits[OURS, 2:])
    assert relative_error(c.logits[0, 2:], a.logits[OURS, 2:]) < LAST_BITS
    for step in range(3):
        mask, other_mask = (torch.cat([m, m.new_ones(3, 1)], 1) for m in (mask, other_mask))
        token, other = torch.randint(3, 128, (3, 1)), torch.randint(3, 128, (3, 1))
        other[OURS] = token[OURS]
        a = model(token, attention_mask=mask, memory=one, past_key_values=a.past_key_values)
        b = model(other, attention_mask=other_mask, memory=two, past_key_values=b.past_key_values)
        c = model(token[OURS, None], attention_mask=mask[OURS, None], memory=alone, past_key_values=c.past_key_values)
        assert torch.equal(a.logits[OURS], b.logits[OURS]), step
        assert relative_error(c.logits[0], a.logits[OURS]) < LAST_BITS
    same_row(one, two)
    assert all(relative_error(alone[i][0], one[i][OURS]) < LAST_BITS for i in one)
    assert not any(torch.equal(one[i][0], two[i][0]) for i in one)


def test_generate(model):
    ids = torch.randint(3, 128, (3, 6))
    others = torch.randint(3, 128, (3, 6))
    others[OURS] = ids[OURS]
    one = filled(model, 3)
    two = beside(one, 7)
    given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    a = model.generate(ids, attention_mask=torch.ones_like(ids), memory=one, **given)
    b = model.generate(others, attention_mask=torch.ones_like(ids), memory=two, **given)
    assert torch.equal(a[OURS], b[OURS]) and not torch.equal(a[0], b[0])
    same_row(one, two)


def test_rows_of_a_server():
    model, tokenizer = served_model("msw")
    chats = [chat("My dog is called Rex."), chat("Where did Ada go?"), chat("The market.")]
    wide = max(len(row_of(model, tokenizer, messages).prompt) for messages in chats)
    others = [chats[2], chats[1], chats[0]]  # as wide together: equal shapes
    assert wide == max(len(row_of(model, tokenizer, messages).prompt) for messages in others)
    one = filled(model, 3)
    two = beside(one, 7)
    found = []
    for messages, memory in ((chats, one), (others, two), (chats[OURS : OURS + 1], one.select([OURS]))):
        rows = [row_of(model, tokenizer, message, 8) for message in messages]
        options = greedy(model, tokenizer) | {"logits_processor": says(tokenizer, "To the market.")["logits_processor"]}
        found.append((rows, answer_rows_from(model, rows, memory, True, options, write=True)))
    (a, after), (b, again), (_, alone) = found
    assert a[OURS].answer == b[OURS].answer
    same_row(after, again)
    assert not torch.equal(after[0][OURS], one[0][OURS])
    assert all(relative_error(alone[i][0], after[i][OURS]) < LAST_BITS for i in after)


# --- a place that is given to somebody new


def test_a_bank_s_room_is_empty_for_the_next(tmp_path):
    model, tokenizer = served_model("msw")
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        bank.commit(["ada", "bob"], filled(model, 2))
        raw = bank.gather(["ada"])[0].numpy().tobytes()[:64]
        bank.delete(["ada"])
        assert not any(raw in path.read_bytes() for path in tmp_path.iterdir())
        found = bank.gather(["new", "bob", "ada"])
        for _, state in found.items():
            assert state[1].any() and not state[0].any() and not state[2].any()
        bank.commit(["new"], MemoryState.zeros(model))
        assert not any(state.any() for _, state in bank.gather(["new"]).items())
    with engine_of(model, tokenizer, tmp_path / "users.bank") as engine:

        def job(name):
            return type("Job", (), {"request": type("Request", (), {"memory_id": name})})

        memory = engine._gathered([job(None), job("bob"), job("later"), job(None)])
        for _, state in memory.items():
            assert state[1].any() and not state[[0, 2, 3]].any()


def test_a_request_of_continuous_batching_begins_empty():
    model, _ = served_model("msw")
    requests = Requests(identity_of(model), None)
    memory = requests.memory_of([("a", 0, 4), ("b", 0, 3)])
    for _, state in memory.items():
        state.fill_(7)
    requests.have_read([("a", 0, 4), ("b", 0, 3)])
    requests.end("a")
    memory = requests.memory_of([("c", 0, 2), ("b", 3, 1), ("a", 0, 1)])  # one of the same name is another, too
    for _, state in memory.items():
        assert not state[0].any() and (state[1] == 7).all() and not state[2].any()


@pytest.mark.parametrize("stale", [float("nan"), 7.0])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_block_of_a_paged_cache_begins_empty(tokens, stale):
    """vLLM hands out blocks as others have left them."""
    rule, ops = DeltaRule(8), operations("reference", torch.device("cpu"))
    x, bias, cache = torch.randn(tokens, rule.width), torch.randn(rule.bias_width), torch.full((9, 1, 8, 8), stale)
    plan = make_plan(np.array([0]), np.array([0, tokens]), torch.tensor([[5, 2, 7]]), 4)
    reads = advance_blocks(ops, x, bias, cache, rule, plan)
    exact = ops.scan(x[None], bias, None, rule)
    assert torch.equal(reads, exact.reads[0])
    assert torch.equal(cache[5 if tokens == 1 else 2], exact.state[0])
    assert (torch.isnan(cache[8]) | (cache[8] == stale)).all()
