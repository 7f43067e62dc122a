"""Autocast and GradScaler around training steps: right numbers, float32 masters, and no step on an overflow."""

import functools

import pytest
import torch
import torch.nn.functional as F
from support import loud_adapter, relative_error, tiny_model

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model, record_gates
from deltamem_fast.training.setup import prepare_for_inference, prepare_for_training

IDS = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(3))
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 2)
CONFIGS = {"tsw": DeltaMemConfig(), "ssw": DeltaMemConfig.ssw(), "msw": DeltaMemConfig.msw(heads=2, rank=3)}


def patched(config=None, dtype=torch.float32, **changes):
    model = loud_adapter(patch_model(tiny_model(dtype=dtype, num_hidden_layers=2, **changes), config), scale=0.5)
    return prepare_for_training(model)


def step_loss(model, scale=1.0):
    """A write pass, a read pass, and the penalty."""
    memory = MemoryState.zeros(model, 2)
    segments = SEGMENTS if model.model.layers[0].self_attn.delta_memory.config.segmented else None
    with record_gates() as gates:
        model.model(input_ids=IDS, memory=memory, segment_ids=segments, use_cache=False)
    assert all(state.dtype == torch.float32 for _, state in memory.items())
    memory.frozen = True
    logits = model(IDS, memory=memory, use_cache=False).logits.float() * scale
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()) + gates.penalty()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    return {name: p.grad for name, p in trained(model).items()}


@functools.cache
def in_float32(name, noise=0.0):
    """Loss and gradients in float32, every weight changed by a share of ``noise``."""
    model = patched(CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    loss = step_loss(model)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_rounded(loss, found, name, dtype):
    """Off float32 by no more than four times what weights rounded at random would be."""
    expected_loss, expected = in_float32(name)
    noisy_loss, noisy = in_float32(name, torch.finfo(dtype).eps / 2)
    assert abs(loss - expected_loss) < 4 * abs(noisy_loss - expected_loss) + torch.finfo(dtype).eps
    for key, gradient in expected.items():
        assert found[key].dtype == torch.float32
        assert relative_error(found[key], gradient) < 4 * relative_error(noisy[key], gradient), key


@pytest.mark.parametrize("kind", ("none", "reentrant", "non-reentrant"))
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_step_under_autocast(dtype, name, kind):
    model = patched(CONFIGS[name])
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    with torch.autocast("cpu", dtype):
        loss = step_loss(model)
    loss.backward()
    assert_rounded(loss.detach(), gradients(model), name, dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_half_precision_backbone_under_float32_masters(dtype):
    model = patched(dtype=dtype)
    loss = step_loss(model)
    loss.backward()
    assert_rounded(loss.detach(), gradients(model), "tsw", dtype)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    prepare_for_inference(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_masters_move_by_less_than_the_backbones_dtype_can_tell():
    model = patched(dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    step_loss(model).backward()
    torch.optim.AdamW(trained(model).values(), lr=1e-6, weight_decay=0).step()
    for name, parameter in trained(model).items():
        assert 0 < (parameter - before[name]).abs().max() < 1e-5
    moved = [torch.equal(p.bfloat16(), before[name].bfloat16()) for name, p in trained(model).items()]
    assert any(moved)


def test_the_scaler_skips_a_step_that_overflows():
    model = patched()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for overflows in (False, True, False):
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        scale = scaler.get_scale()
        with torch.autocast("cpu", torch.float16):
            loss = step_loss(model)
        scaler.scale(loss * (float("inf") if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (scaler.get_scale() < scale) is overflows
        for name, parameter in trained(model).items():
            assert torch.isfinite(parameter).all()
            assert torch.equal(parameter, before[name]) is overflows, name
    # What the overflow left in no parameter is in no memory either.
    memory = MemoryState.zeros(model, 2)
    with torch.no_grad():
        model(IDS, memory=memory, use_cache=False)
    assert all(torch.isfinite(state).all() for _, state in memory.items()) and memory.skipped.sum() == 0
