"""Gradient checkpointing: the gradients of a training step are the same with either kind and without."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from support import loud_adapter, relative_error, tiny_model
from torch.utils.checkpoint import checkpoint

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model, record_gates
from deltamem_fast.training.setup import prepare_for_training

GENERATOR = torch.Generator().manual_seed(3)
WRITE = torch.randint(3, 128, (2, 10), generator=GENERATOR)
READ = torch.randint(3, 128, (2, 7), generator=GENERATOR)
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10])
SEGMENTS = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, 1, 1, -1], [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]])
CONFIGS = {
    "tsw": DeltaMemConfig(),
    "ssw": DeltaMemConfig.ssw(),
    "msw": DeltaMemConfig.msw(heads=2, rank=3),
    "loud": DeltaMemConfig(
        delta_heads=("q", "k", "v", "o"), couple_lambda=False, delta_o_rmsnorm=True, trainable_delta_scale=True
    ),
}
KINDS = ("none", "non-reentrant", "reentrant")


def patched(kind="none", config=None, backend="numba", **changes):
    model = loud_adapter(patch_model(tiny_model(attention="eager", **changes), config, backend=backend))
    prepare_for_training(model)
    return checkpointed(model, kind)


def checkpointed(model, kind):
    if kind != "none":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    return model


def write(model, memory, tokens=slice(None)):
    segments = SEGMENTS[:, tokens] if model.model.layers[0].self_attn.delta_memory.config.segmented else None
    ids, mask = WRITE[:, tokens], MASK[:, tokens].bool()
    model.model(input_ids=ids, token_mask=mask, memory=memory, segment_ids=segments, use_cache=False)


def read(model, memory, ids=READ):
    memory.frozen = True
    logits = model(ids, memory=memory, use_cache=False).logits
    memory.frozen = False
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(kinds, step, tolerance=1e-4):
    """``step(kind)`` → (loss, gradients) by name: all kinds' are equal, and none is missing or zero."""
    expected_loss, expected = step(kinds[0])
    assert all(g is not None and g.norm() > 0 for g in expected.values()), [n for n, g in expected.items() if g is None]
    for kind in kinds[1:]:
        loss, found = step(kind)
        assert torch.allclose(loss, expected_loss, rtol=1e-6), kind
        for name, gradient in expected.items():
            assert found[name] is not None, (kind, name)
            assert relative_error(found[name], gradient) < tolerance, (kind, name)


@pytest.mark.parametrize("backend", ("numba", "reference"))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step(name, backend):
    def step(kind):
        model = patched(kind, CONFIGS[name], backend)
        memory = MemoryState.zeros(model, 2)
        with record_gates() as gates:
            write(model, memory, slice(0, 6))
            write(model, memory, slice(6, 10))
        loss = read(model, memory) + 3 * gates.penalty(0.3)
        loss.backward()
        return loss.detach(), gradients(model)

    assert_same(KINDS, step)


def test_the_penalty_alone():
    def step(kind):
        model = patched(kind)
        with record_gates() as gates:
            write(model, MemoryState.zeros(model, 2))
        loss = gates.penalty(0.3)
        loss.backward()
        found = {n: g for n, g in gradients(model).items() if "layers.0" in n and ("beta" in n or "delta" in n)}
        return loss.detach(), found

    assert_same(KINDS, step)


def test_a_memory_that_outlives_its_first_loss():
    def step(kind):
        model = patched(kind)
        memory = MemoryState.zeros(model, 2)
        write(model, memory)
        first = read(model, memory)
        first.backward(retain_graph=True)
        write(model, memory, slice(2, 7))
        second = read(model, memory, READ.flip(1)) + (memory[1] ** 2).mean()
        second.backward()
        return (first + second).detach(), gradients(model)

    assert_same(KINDS, step)


def test_a_read_that_writes_too():
    """The decoder's hidden states and its memory are both in the loss."""

    def step(kind):
        model = patched(kind)
        memory = MemoryState.zeros(model, 2)
        loss = 0
        for ids in (WRITE, READ):
            logits = model(ids, memory=memory, use_cache=False).logits
            loss = loss + logits.pow(2).mean()
        loss = loss + sum((state**2).mean() for _, state in memory.items())
        loss.backward()
        return loss.detach(), gradients(model)

    assert_same(KINDS, step)


def test_a_learnt_start():
    """The first state is a parameter of its own, and so are the embeddings: both get their gradients."""

    def step(kind):
        model = patched(kind)
        starts = {i: torch.full((2, 1, 8, 8), 0.1 * (i + 1), requires_grad=True) for i in range(3)}
        embeds = model.get_input_embeddings()(READ).detach().requires_grad_()
        memory = MemoryState(starts, frozen=True)
        loss = model(inputs_embeds=embeds, memory=memory, use_cache=False, return_dict=False)[0].pow(2).mean()
        loss.backward()
        return loss.detach(), {"embeds": embeds.grad} | {str(i): start.grad for i, start in starts.items()}

    assert_same(KINDS, step)


def test_some_layers_checkpointed():
    def step(kind):
        model = patched(kind)
        if kind == "reentrant":
            model.model.layers[1].gradient_checkpointing = False
        memory = MemoryState.zeros(model, 2)
        with record_gates() as gates:
            write(model, memory)
        loss = read(model, memory) + gates.penalty()
        loss.backward()
        return loss.detach(), gradients(model)

    assert_same(("none", "reentrant"), step)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_needed_at_the_input(kind):
    """Frozen embeddings without enable_input_require_grads: a reentrant checkpoint would drop every gradient."""
    model = patched(kind)
    model.disable_input_require_grads()
    memory = MemoryState.zeros(model, 2)
    write(model, memory)
    read(model, memory).backward()
    assert all(g is not None and g.norm() > 0 for g in gradients(model).values())


def wrap_layers(model, use_reentrant):
    """Checkpoints that the model knows nothing of."""
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda hidden_states, forward=forward, **kwargs: checkpoint(
            lambda x: forward(x, **kwargs), hidden_states, use_reentrant=use_reentrant
        )
    return model


def test_checkpoints_that_the_model_does_not_know_of():
    model = wrap_layers(patched(), use_reentrant=True)
    memory = MemoryState.zeros(model, 2)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        write(model, memory)
    with pytest.raises(ValueError, match="nothing that went into the layers required a gradient"):
        read(model, memory)
    model.enable_input_require_grads()
    memory = MemoryState.zeros(model, 2)
    write(model, memory)
    with pytest.raises(ValueError, match="reentrant checkpointing that is not the model's own"):
        read(model, memory)
    with torch.no_grad():
        read(model, memory)
    read(model, memory.detach()).backward()
    # From a memory without gradients, one write is differentiable even so.
    expected = patched()
    for each in (model, expected):
        each.zero_grad()
        memory = MemoryState.zeros(each, 2)
        write(each, memory)
        sum((state**2).mean() for _, state in memory.items()).backward()
    found = gradients(model)
    for name, gradient in gradients(expected).items():
        if gradient is not None:
            assert relative_error(found[name], gradient) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_nothing_behind(kind):
    model = patched(kind)

    def step(backward):
        memory = MemoryState.zeros(model, 2)
        with record_gates() as gates:
            write(model, memory)
        loss = read(model, memory) + gates.penalty()
        if backward:
            loss.backward()
        return [weakref.ref(state) for _, state in memory.items()]

    for backward in (True, False):
        states = step(backward)
        gc.collect()
        assert [state() for state in states] == [None] * 3


def test_a_checkpoints_first_run_rounds_as_its_recomputation():
    """Both take the generic path, though nothing is differentiated in the first."""
    model = loud_adapter(patch_model(tiny_model(dtype=torch.bfloat16))).train()
    expected = model(READ, use_cache=False).logits
    checkpointed(model, "reentrant")
    assert torch.equal(model(READ, use_cache=False).logits, expected)
