"""What every launcher refuses, and what it does with slots, strides and devices that are not the usual ones."""

import heads_properties
import kernel_properties as properties
import pytest
import torch

from deltamem_kernels import rule as checks
from deltamem_kernels.layout import HeadLayout
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton.decode import decode_
from deltamem_kernels.triton.heads import steer_heads_
from deltamem_kernels.triton.read import read
from deltamem_kernels.triton.read_backward import read_backward
from deltamem_kernels.triton.scan import scan
from deltamem_kernels.triton.scan_backward import scan_backward
from deltamem_kernels.triton.steer import delta, steer
from deltamem_kernels.triton.steer_backward import steer_backward
from deltamem_kernels.triton.step import step

RULE = DeltaRule(4, 2)
LAYOUT = HeadLayout(2, 1, 1, 16, 16)
STATES, BATCH = 3, 2
# 2 sequences of one token; their slots and the launchers' other arguments are what the tests change.
X, BIAS, _, _ = properties.random_problem(RULE, BATCH, 1, seed=1)
POOL = properties.random_problem(RULE, STATES, 1, seed=2)[2]
D_READS, D_STATE = torch.randn(BATCH, 1, RULE.read_width), torch.randn(BATCH, 2, 4, 4)


def decode(packed, bias, state, slots, cos, sin, steering, **given):
    return decode_(packed, bias, state, RULE, LAYOUT, steering, cos, sin, slots=slots, **given)


def rows():
    steering = heads_properties.random_steering(LAYOUT, RULE.read_width, "qo")
    packed, cos, sin = heads_properties.random_rows(LAYOUT, (BATCH,), RULE.width, torch.float32)
    packed[:, LAYOUT.width :] = X[:, 0]
    return packed, cos, sin, steering


def decoded(state, slots):
    packed, cos, sin, steering = rows()
    arrived = torch.zeros(BATCH, dtype=torch.int32)
    return decode(packed, BIAS, state, slots, cos, sin, steering, workspace=arrived)[0]


WITH_SLOTS = {
    "scan": lambda state, slots: scan(X, BIAS, state, RULE, slots=slots)[:2],
    "scan in chunks": lambda state, slots: scan(X, BIAS, state, RULE, slots=slots, chunk=1)[:2],
    "step": lambda state, slots: (step(X[:, 0], BIAS, state, RULE, slots=slots),),
    "read": lambda state, slots: (read(X, state, RULE, slots=slots),),
    "decode": lambda state, slots: (decoded(state, slots),),
    "scan_backward": lambda state, slots: scan_backward(D_READS, D_STATE, X, BIAS, state, RULE, slots=slots),
    "scan_backward in chunks": lambda state, slots: scan_backward(
        D_READS, D_STATE, X, BIAS, state, RULE, slots=slots, chunk=2, spacing=(2, 2)
    ),
    "read_backward": lambda state, slots: read_backward(D_READS, X, state, RULE, slots=slots),
}


@pytest.mark.parametrize("name", WITH_SLOTS)
def test_slots_that_name_no_row_are_refused(name):
    pool = POOL.clone()
    for slots, wrong in (([0, 3], 3), ([-2, 0], -2), ([2**31 - 1, 0], 2**31 - 1)):
        with pytest.raises(IndexError, match=f"slots: got {wrong}, allowed −1 to 2"):
            WITH_SLOTS[name](pool, torch.tensor(slots, dtype=torch.int32))
    assert torch.equal(pool, POOL)


@pytest.mark.parametrize("name", WITH_SLOTS)
def test_on_a_device_they_count_as_none(name, monkeypatch):
    """Where the host cannot look, a slot that names no row is −1: nothing outside of the state is touched. The slots
    may have any stride."""
    monkeypatch.setattr(checks, "check_slots", lambda slots, states: None)
    for wrong in (3, -5, 2**31 - 1) if name == "step" else (3,):
        mine, other = POOL.clone(), POOL.clone()
        found = WITH_SLOTS[name](mine, torch.tensor([2, 1, wrong, 1], dtype=torch.int32)[::2])
        expected = WITH_SLOTS[name](other, torch.tensor([2, -1], dtype=torch.int32))
        assert properties.equal(found, expected) and torch.equal(mine, other)


def test_sequence_starts_of_any_stride():
    x = X.reshape(1, 2, -1)
    starts = torch.tensor([0, 7, 1, 7, 2, 7])[::2]
    for chunk in (0, 2):
        near, there = (scan(x, BIAS, None, RULE, cu_seqlens=c, chunk=chunk) for c in (starts.contiguous(), starts))
        assert properties.equal(there[:2], near[:2])


def on_meta(tensor):
    return tensor.to("meta")


W = torch.randn(8, 8)
STEERED = {"base": torch.randn(2, 8), "reads": torch.randn(2, 8), "weight": W, "norm_weight": torch.ones(8)}
AWAY = {
    "steer": (lambda **t: steer(t["base"], t["reads"], t["weight"], 1.0, norm_weight=t["norm_weight"]), STEERED),
    "delta": (
        lambda **t: delta(t["reads"], t["weight"], 1.0, torch.float32, norm_weight=t["norm_weight"]),
        {name: STEERED[name] for name in ("reads", "weight", "norm_weight")},
    ),
    "steer_backward": (
        lambda **t: steer_backward(t["base"], t["reads"], t["weight"], 1.0, norm_weight=t["norm_weight"]), STEERED,
    ),
    "scan": (
        lambda **t: scan(t["x"], t["gate_bias"], None, RULE, cu_seqlens=t["cu_seqlens"]),
        {"x": X.reshape(1, 2, -1), "gate_bias": BIAS, "cu_seqlens": torch.tensor([0, 1, 2])},
    ),
    "step": (
        lambda **t: step(t["x"], t["gate_bias"], t["state"], RULE, skipped=t["skipped"]),
        {"x": X[:, 0], "gate_bias": BIAS, "state": POOL[:2].clone(), "skipped": torch.zeros(2, dtype=torch.int32)},
    ),
    "scan_backward": (
        lambda **t: scan_backward(t["d_reads"], t["d_state"], t["x"], BIAS, POOL[:2], RULE),
        {"x": X, "d_reads": D_READS, "d_state": D_STATE},
    ),
    "read_backward": (lambda **t: read_backward(t["d_reads"], t["x"], POOL[:2], RULE), {"x": X, "d_reads": D_READS}),
    "steer_heads": (
        lambda **t: steer_heads_(t["packed"], t["reads"], LAYOUT, heads_properties.random_steering(LAYOUT, 8, "q"),
                                 torch.ones(1, 1, 16), torch.ones(1, 1, 16)),
        {"packed": torch.randn(2, 1, 64), "reads": torch.randn(2, 1, 8)},
    ),
    "decode": (
        lambda **t: decode(
            rows()[0], BIAS, t["state"], None, *rows()[1:], skipped=t["skipped"], workspace=t["workspace"]
        ),
        {"state": POOL[:2].clone(), "skipped": torch.zeros(2, dtype=torch.int32),
         "workspace": torch.zeros(2, dtype=torch.int32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AWAY)
def test_tensors_on_another_device_are_refused(name):
    call, tensors = AWAY[name]
    call(**tensors)
    for which in list(tensors)[1:] if name != "decode" else tensors:
        with pytest.raises(ValueError, match=rf"{which}: on meta, but \w+ (is|are) on cpu"):
            call(**tensors | {which: on_meta(tensors[which])})


def spread(tensor, dim, stride):
    """A tensor of the same shape, ``stride`` elements apart along ``dim``. It is to be refused, not read: memory that
    nobody touches costs nothing."""
    strides = list(tensor.stride())
    strides[dim] = stride
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, strides)) + 1
    return torch.empty(reach, dtype=tensor.dtype).as_strided(tensor.shape, strides)


def test_reaches_past_32_bits_are_refused():
    half = 2**31 // 7 + 1
    with pytest.raises(ValueError, match=r"gate_bias: got strides \[\d+\] .* below 2\^31"):
        step(X[:, 0], spread(BIAS, 0, half), POOL[:2].clone(), RULE)
    with pytest.raises(ValueError, match="weight: got strides"):
        steer(STEERED["base"], STEERED["reads"], spread(W, 1, half), 1.0)
    with pytest.raises(ValueError, match="reads: got strides"):
        delta(spread(STEERED["reads"], 1, half), W, 1.0, torch.float32)
    with pytest.raises(ValueError, match="norm_weight: got strides"):
        steer_backward(*(STEERED[n] for n in ("base", "reads", "weight")), 1.0, norm_weight=spread(BIAS, 0, half))
    packed, cos, sin, steering = rows()
    with pytest.raises(ValueError, match="q: got strides"):
        decode(packed, BIAS, POOL[:2].clone(), None, cos, sin, steering._replace(q=spread(steering.q, 1, half)))


def test_float64_norms_and_too_many_tokens_are_refused():
    norm = torch.ones(8, dtype=torch.float64)
    with pytest.raises(TypeError, match="norm_weight: got dtype torch.float64"):
        steer(*(STEERED[name] for name in ("base", "reads", "weight")), 1.0, norm_weight=norm)
    with pytest.raises(TypeError, match="norm_weight: got dtype torch.float64"):
        delta(STEERED["reads"], W, 1.0, torch.float32, norm_weight=norm)
    with pytest.raises(TypeError, match="norm_weight: got dtype torch.float64"):
        steer_backward(*(STEERED[name] for name in ("base", "reads", "weight")), 1.0, norm_weight=norm)
    with pytest.raises(ValueError, match=r"projections: got \d+ tokens × 2 head\(s\), allowed below 2\^31"):
        read(X[:, :1].expand(2, 2**29, -1), POOL[:2], RULE)


@pytest.mark.parametrize("chunk", [0, 2])
def test_sequence_starts_past_the_tokens_write_nowhere_else(chunk):
    """The host cannot see them without waiting; the kernels stay inside of what they were given."""
    x = X.reshape(1, 2, -1)
    right = scan(x, BIAS, None, RULE, cu_seqlens=torch.tensor([0, 2]), chunk=chunk)
    wrong = scan(x, BIAS, None, RULE, cu_seqlens=torch.tensor([0, 2000]), chunk=chunk)
    assert torch.equal(wrong.reads, right.reads) and wrong.state.isfinite().all()
