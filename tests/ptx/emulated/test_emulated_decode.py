"""decode_ under many schedules: one state, the bits of step, whoever arrives last; and that a broken one is caught."""

import re

import heads_properties as heads
import pytest
import torch
from kernel_properties import random_problem

from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton.decode import decode_
from deltamem_kernels.triton.step import step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [  # rank, heads, dtype, (dim, rotary), corrected heads, parts, norm, raw scales
    (8, 1, BF16, (128, 128), "qo", None, True, 0),
    (16, 1, BF16, (16, 16), "qo", None, True, 0),
    (8, 4, BF16, (16, 16), "qo", None, True, 0),
    (8, 1, FP16, (16, 0), "", None, True, 4),
    (8, 1, FP32, (16, 16), "qo", None, True, 0),
    (8, 1, BF16, (16, 8), "qkvo", None, False, 1),
    (8, 1, BF16, (64, 64), "qo", None, False, 0),
    (4, 1, BF16, (16, 16), "qkvo", None, True, 0),
    (8, 1, BF16, (128, 128), "qo", 3, True, 0),
]


def problem(rank, count, dtype, shape, which, normed, raws, batch, outputs=20):
    rule, layout = DeltaRule(rank, count), HeadLayout(2, 1, 1, *shape)
    x, bias, state, _ = random_problem(rule, batch, 1, dtype, seed=3)
    packed, cos, sin = heads.random_rows(layout, (batch,), rule.width, dtype, seed=3)
    packed[:, layout.width :] = x[:, 0]
    steering = heads.random_steering(layout, rule.read_width, which, normed, raws, outputs, dtype=dtype, seed=3)
    return rule, layout, packed, bias, state, steering, cos, sin


def check_order(emulator, case, batch, schedules):
    rank, count, dtype, shape, which, parts, normed, raws = case
    rule, layout, packed, bias, state, *rest = problem(rank, count, dtype, shape, which, normed, raws, batch)
    stepped = state.clone()
    reads = step(packed[:, layout.width :], bias, stepped, rule)
    states, wrong = set(), []
    for schedule in range(schedules):
        emulator.seed = 100 * schedule
        own, arrived = state.clone(), torch.zeros(batch, dtype=torch.int32)
        found, _ = decode_(
            heads.same_strides(packed), bias, own, rule, layout, *rest, workspace=arrived, parts=parts
        )  # fmt: skip
        states.add(own.numpy().tobytes())
        wrong.append(int((own.view(torch.int32) != stepped.view(torch.int32)).sum()))
        assert torch.equal(found, reads) and not arrived.any()
        assert emulator.records[-1].grid == batch * parts if parts else emulator.records[-1].grid > batch
    assert len(states) == 1, f"{len(states)} different states over {schedules} schedules"
    assert not any(wrong), f"{min(wrong)} to {max(wrong)} of {state.numel()} numbers are not step's"


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_the_order_of_arrival_makes_no_difference(emulator, case):
    check_order(emulator, case, batch=2, schedules=5)


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_order_of_arrival_makes_a_difference(emulator, case):
    check_order(emulator, case, batch=4, schedules=12)


def relaxed(text):
    return text.replace("atom.global.gpu.acq_rel.add", "atom.global.gpu.relaxed.add")


def first_writes(text):
    """The program that finds 0 writes the state, not the one that finds all others there."""
    found = re.search(r"(atom\.global\.gpu\.acq_rel.*?setp\.(?:ne|eq)\.b32\s+%p\d+, %r\d+, )(\d+)(;)", text, re.S)
    return text[: found.start(2)] + "0" + text[found.end(2) :] if found else text


EDITS = {"as-compiled": None, "relaxed": relaxed, "first-writes": first_writes}


def check_edit(emulator, rank, count, parts, name, schedules):
    rule, layout, packed, bias, state, *rest = problem(rank, count, BF16, (16, 16), "qo", True, 0, batch=2)
    stepped = state.clone()
    reads = step(packed[:, layout.width :], bias, stepped, rule)
    edit, edited = EDITS[name], []

    def change(text):
        if edit is None or not re.search(r"\.entry\s+decode_kernel", text):
            return text
        edited.append(edit(text) != text)
        return edit(text)

    emulator.programs.clear()
    emulator.strict, emulator.edit = False, change
    caught = []
    for schedule in range(schedules):
        emulator.seed = 1000 * schedule
        own, arrived = state.clone(), torch.zeros(2, dtype=torch.int32)
        found, _ = decode_(heads.same_strides(packed), bias, own, rule, layout, *rest, workspace=arrived, parts=parts)
        wrong = [(a - b).abs().max() > 1e-4 for a, b in ((own, stepped), (found, reads))]
        races = [what for what, _ in emulator.records[-1].problems if what.startswith("race")]
        caught.append(any(wrong) or bool(races) or bool(arrived.any()))
    emulator.programs.clear()
    if edit is None:
        assert not any(caught)
    else:
        assert edited and all(edited), "the edit has not changed the kernel"
        assert any(caught), f"unnoticed in {schedules} schedules"


@pytest.mark.parametrize("name", EDITS)
def test_a_broken_arrival_is_caught(emulator, name):
    check_edit(emulator, 8, 1, 3, name, schedules=4)


@pytest.mark.soak
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(("rank", "count", "parts"), [(8, 1, None), (8, 1, 3), (16, 4, 3)])
def test_a_broken_arrival_is_always_caught(emulator, rank, count, parts, name):
    check_edit(emulator, rank, count, parts, name, schedules=12)
