"""64 users whose turns are interleaved at random through gather, forward, commit are the same 64 users run alone."""

import random

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model

from deltamem_fast import BankConflict, DeltaMemConfig, MemoryBank, MemoryState, patch_model

USERS, TURNS, LENGTH = 64, 3, 12
SOMEBODY = torch.randint(3, 128, (64, LENGTH), generator=torch.Generator().manual_seed(99))
SAID = torch.randint(3, 128, (USERS, TURNS, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=("tsw", "msw"))
def model(request):
    config = DeltaMemConfig() if request.param == "tsw" else DeltaMemConfig.msw(heads=2)
    return loud_adapter(patch_model(tiny_model(), config))


def schedule(draw, sizes):
    """Batches of (user, turn) pairs, no user twice in one; each user's turns in order, whose is next at random."""
    left = dict.fromkeys(range(USERS), 0)
    while left:
        users = draw.sample(sorted(left), min(draw.choice(sizes), len(left)))
        yield [(user, left[user]) for user in users]
        for user in users:
            left[user] += 1
            if left[user] == TURNS:
                del left[user]


def forward(model, tokens, memory):
    with torch.no_grad():
        return model(tokens, memory=memory).logits


def through_the_bank(model, bank, batches, fill):
    """Places and logits of each (user, turn). Batches are filled up to ``fill`` rows with somebody's tokens."""
    places, logits = {}, {}
    for batch in batches:
        names = [f"user-{user}" for user, _ in batch]
        others = [f"somebody-{n}" for n in range(fill - len(batch))]
        tokens = torch.stack([*(SAID[user, turn] for user, turn in batch), *SOMEBODY[: len(others)]])
        memory = bank.gather(names + others)
        out = forward(model, tokens, memory)
        bank.commit(names, memory.select(range(len(names))))
        for row, one in enumerate(batch):
            places[one], logits[one] = row, out[row]
    return places, logits


def alone(model, user, rows, places):
    """Logits [TURNS, T, V] and the memory of one user in row ``places[turn]`` of ``rows``, the others somebody's."""
    logits, own = [], MemoryState.zeros(model, 1)
    for turn in range(TURNS):
        row = places[turn]
        others = MemoryState.zeros(model, rows)
        for _, state in others.items():
            state.normal_(0, 0.1)
        memory = MemoryState.cat([others.select(range(row)), own, others.select(range(row + 1, rows))])
        tokens = SOMEBODY[torch.randperm(len(SOMEBODY))[:rows]].clone()
        tokens[row] = SAID[user, turn]
        logits.append(forward(model, tokens, memory)[row])
        own = memory.select([row])
    return torch.stack(logits), own


def test_bit_for_bit_at_equal_batch_size(model, tmp_path):
    rows = 8
    with MemoryBank(tmp_path / "users.bank", model, durable=False) as bank:
        batches = schedule(random.Random(1), [rows])
        places, logits = through_the_bank(model, bank, batches, rows)
        assert len(logits) == USERS * TURNS and len(bank) == USERS
        for user in range(USERS):
            theirs, own = alone(model, user, rows, [places[user, turn] for turn in range(TURNS)])
            ours = bank.gather([f"user-{user}"])
            assert all(torch.equal(ours[i], own[i]) for i in own), user
            assert torch.equal(torch.stack([logits[user, turn] for turn in range(TURNS)]), theirs), user
            assert own[0].abs().max() > 0.01


def test_close_over_batches_of_any_size(model, tmp_path):
    with MemoryBank(tmp_path / "users.bank", model, durable=False) as bank:
        batches = schedule(random.Random(2), [1, 2, 3, 5, 8, 13, 16, 31])
        _, logits = through_the_bank(model, bank, batches, 0)
        assert len(logits) == USERS * TURNS
        for user in range(USERS):
            theirs, own = alone(model, user, 1, [0] * TURNS)
            ours = bank.gather([f"user-{user}"])
            assert all(relative_error(ours[i], own[i]) <= 1e-5 for i in own)
            assert relative_error(torch.stack([logits[user, turn] for turn in range(TURNS)]), theirs) <= 1e-5


def test_the_place_in_a_batch_does_not_matter(model):
    """One user in each row of a batch beside anybody; only reordered sums of the backbone could differ."""
    for rows in (2, 5, 8):
        results = [alone(model, 0, rows, [row] * TURNS)[1] for row in range(rows)]
        assert all(relative_error(other[i], results[0][i]) <= 1e-5 for other in results for i in other)


def test_a_turn_that_was_overtaken_is_repeated(model, tmp_path):
    """Two holders of one user's memory: the refused one gathers again and reads what the other wrote."""
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        slow, fast = bank.gather(["u"]), bank.gather(["u"])
        forward(model, SAID[0, 1][None], slow)
        forward(model, SAID[0, 0][None], fast)
        bank.commit(["u"], fast)
        with pytest.raises(BankConflict):
            bank.commit(["u"], slow)
        again = bank.gather(["u"])
        forward(model, SAID[0, 1][None], again)
        bank.commit(["u"], again)
        ours, kept = bank.gather(["u"]), MemoryState.zeros(model, 1)
        for turn in range(2):
            forward(model, SAID[0, turn][None], kept)
        assert all(torch.equal(ours[i], kept[i]) for i in kept)
