"""The paged core against the recurrence: any order of steps over any blocks is the whole sequence at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_fast.vllm.advance import advance_blocks, step_blocks
from deltamem_fast.vllm.plan import NOTHING, READS, WRITES, make_plan
from deltamem_kernels.dispatch import operations
from deltamem_kernels.rule import DeltaRule
from tests.support import relative_error

RULES = [
    DeltaRule(rank=8),
    DeltaRule(rank=4, heads=3, mode="lambda_outside", coupled=False, row_gates=False),
    DeltaRule(rank=8, mode="no_lambda", normalize=True),
]


def whole(projections, bias, rule, state, use):
    """The reference's reads and the state after every token, in float64, of one sequence [T, W]."""
    reference, state = operations("reference", torch.device("cpu")), state[None].double()
    if use == NOTHING:
        return torch.zeros(len(projections), rule.read_width), state
    if use == READS:
        return reference.read(projections[None].double(), state, rule)[0], state
    out = reference.scan(projections[None].double(), bias.double(), state, rule, checkpoint_every=1)
    return out.reads[0], out.checkpoints[0]


def error_of_reads(found, wanted, states):
    """‖found − wanted‖ by the size of the sums that reads are: where k and q are at a right angle little is left."""
    return (found.double() - wanted).norm() / torch.cat([wanted.flatten(), states.flatten()]).norm().clamp(min=1e-30)


def advanced(operators, projections, bias, cache, rule, plan, table):
    """A step as a layer takes it: in one call, if the backend has one, and all resume."""
    kind, nothing = getattr(operators, "BlockStep", None), torch.empty(len(projections), 0)
    if kind is not None:
        # What is read, told by the identity, is all that stands in rows of zeros.
        identity = (0, torch.eye(rule.read_width), 1.0)
        rows = torch.zeros(len(projections), rule.read_width)
        step = kind(cache, rule, [identity, None, None, None])
        done, reads = step_blocks(step, projections, bias, plan, rows, nothing)
        if done:
            return rows if reads is None else reads
    return advance_blocks(operators, projections, bias, cache, rule, plan, table)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), backend=st.sampled_from(["reference", "numba"]), strided=st.booleans())
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.mode}-{rule.heads}")
def test_any_schedule_is_the_whole_sequence(rule, data, backend, strided):
    """Sequences of any lengths, cut into steps anyhow, in a cache whose unwritten blocks hold NaN.

    Each starts from zeros or a state of the table, and writes, only reads, or does neither.
    """
    block = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    bias = torch.randn(rule.bias_width, generator=generator)
    tokens = [torch.randn(length, rule.width, generator=generator) for length in lengths]
    uses = data.draw(st.lists(st.sampled_from([WRITES, WRITES, READS, NOTHING]), min_size=4, max_size=4))[
        : len(lengths)
    ]
    slots = data.draw(st.lists(st.integers(-1, 2), min_size=4, max_size=4))[: len(lengths)]
    given = torch.randn(3, rule.heads, rule.rank, rule.rank, generator=generator)
    first = [given[slot] if slot >= 0 else torch.zeros_like(given[0]) for slot in slots]
    expected = [whole(each, bias, rule, state, use) for each, state, use in zip(tokens, first, uses)]
    told = {"uses": np.array(uses), "slots": np.array(slots)}
    if uses == [WRITES] * len(uses) and slots == [-1] * len(slots):
        told = {}
    needed = [-(-length // block) for length in lengths]
    ids = torch.randperm(sum(needed) + 2, generator=generator).numpy()
    table = np.zeros((len(lengths), max(needed)), np.int32)
    for row, count in enumerate(needed):
        table[row, :count] = ids[sum(needed[:row]) :][:count]
    room = torch.full((len(ids), 2 if strided else 1, rule.heads, rule.rank, rule.rank), torch.nan)
    cache = room[:, -1]
    operators = operations(backend, torch.device("cpu"))

    done = [0] * len(lengths)
    reads = [[] for _ in lengths]
    while any(d < length for d, length in zip(done, lengths)):
        counts = [data.draw(st.integers(0, length - d)) for d, length in zip(done, lengths)]
        if not any(counts):
            counts = [min(1, length - d) for d, length in zip(done, lengths)]
        padding = data.draw(st.integers(0, 2))
        batch = torch.cat([each[d : d + c] for each, d, c in zip(tokens, done, counts)])
        batch = torch.cat([batch, torch.full((padding, rule.width), torch.nan)])
        plan = make_plan(np.array(done), np.cumsum([0, *counts]), torch.from_numpy(table), block, **told)
        found = advanced(operators, batch, bias, cache, rule, plan, given if told else None)
        assert found.shape == (len(batch), rule.read_width) and found.dtype == torch.float32
        assert not found[len(batch) - padding :].any()
        for row, part in enumerate(found[: sum(counts)].split(counts)):
            reads[row].append(part)
        done = [d + c for d, c in zip(done, counts)]

    for row, (wanted, states) in enumerate(expected):
        assert error_of_reads(torch.cat(reads[row]), wanted, states) < 1e-5
        for place in range(needed[row] if uses[row] == WRITES else 0):
            last = min((place + 1) * block, lengths[row]) - 1
            assert relative_error(cache[table[row, place]], states[last]) < 1e-5
    touched = {int(b) for r, n in enumerate(needed) if uses[r] == WRITES for b in table[r, :n]}
    untouched = [int(i) for i in ids if int(i) not in touched]
    assert torch.isnan(cache[untouched]).all()
    if strided:
        assert torch.isnan(room[:, 0]).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), backend=st.sampled_from(["reference", "numba"]))
@pytest.mark.parametrize("rule", RULES[:2], ids=lambda rule: f"{rule.mode}-{rule.heads}")
def test_what_was_read_before_is_read_alone_and_what_follows_is_written(rule, data, backend):
    """Sequences that start from states of a table, and write from their n-th token on, in any steps."""
    block = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    firsts = [data.draw(st.integers(0, length)) for length in lengths]
    slots = [data.draw(st.integers(-1, 2)) for _ in lengths]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    bias = torch.randn(rule.bias_width, generator=generator)
    tokens = [torch.randn(length, rule.width, generator=generator) for length in lengths]
    table = torch.randn(3, rule.heads, rule.rank, rule.rank, generator=generator)
    needed = [-(-length // block) for length in lengths]
    ids = torch.randperm(sum(needed), generator=generator).numpy()
    blocks = np.zeros((len(lengths), max(needed)), np.int32)
    for row, count in enumerate(needed):
        blocks[row, :count] = ids[sum(needed[:row]) :][:count]
    cache = torch.full((len(ids), rule.heads, rule.rank, rule.rank), torch.nan)
    operators = operations(backend, torch.device("cpu"))

    done, reads = [0] * len(lengths), [[] for _ in lengths]
    while any(d < length for d, length in zip(done, lengths)):
        counts = [data.draw(st.integers(0, length - d)) for d, length in zip(done, lengths)]
        if not any(counts):
            counts = [min(1, length - d) for d, length in zip(done, lengths)]
        batch = torch.cat([each[d : d + c] for each, d, c in zip(tokens, done, counts)])
        plan = make_plan(
            np.array(done), np.cumsum([0, *counts]), torch.from_numpy(blocks), block,
            uses=np.full(len(lengths), WRITES), slots=np.array(slots), firsts=np.array(firsts),
        )  # fmt: skip
        found = advanced(operators, batch, bias, cache, rule, plan, table)
        for row, part in enumerate(found.split(counts)):
            reads[row].append(part)
        done = [d + c for d, c in zip(done, counts)]

    reference = operations("reference", torch.device("cpu"))
    for row, (length, first, slot) in enumerate(zip(lengths, firsts, slots)):
        state = torch.zeros_like(table[:1]) if slot < 0 else table[slot : slot + 1]
        wanted, after = reference.read(tokens[row][None, :first].double(), state.double(), rule)[0], state.double()
        if first < length:
            out = reference.scan(tokens[row][None, first:].double(), bias.double(), after, rule)
            wanted, after = torch.cat([wanted, out.reads[0]]), out.state
            assert relative_error(cache[blocks[row, (length - 1) // block]], after[0]) < 1e-5
        assert error_of_reads(torch.cat(reads[row]), wanted, after) < 1e-5
