"""Gate statistics: what record_gates counts is SPEC.md's β of the written tokens, and nothing else."""

import threading

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model, record_gates
from deltamem_fast.memory.watch import capture_projections
from deltamem_kernels.reference.recurrence import split_projections

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
CONFIGS = {
    "tsw": DeltaMemConfig(),
    "msw": DeltaMemConfig.msw(heads=2, rank=3),
    "scalar-uncoupled": DeltaMemConfig(rankwise_gates=False, couple_lambda=False),
}


def patched(config=None, backend="numba", **changes):
    return loud_adapter(patch_model(tiny_model(**changes), config, backend=backend))


def betas_by_hand(model, mask=None):
    """β of every layer, [tokens, gates], from the projections of a hooked forward."""
    found = {}

    def look(attention, args, kwargs):
        memory = attention.delta_memory
        raw, bias = memory.project(kwargs["hidden_states"])
        beta = split_projections(raw, bias, memory.rule)[-1]
        beta = beta if memory.rule.row_gates else beta[..., :1]
        found[memory.layer_idx] = beta.flatten(2)[slice(None) if mask is None else mask.bool()]

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(IDS, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {i: beta.flatten() for i, beta in found.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ("numba", "reference"))
def test_mean_and_statistics(name, backend):
    model = patched(CONFIGS[name], backend)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.delta_memory.beta_bias.mul_(8)
    with record_gates() as gates:
        model(IDS, attention_mask=MASK, use_cache=False)
    expected = betas_by_hand(model, MASK)
    assert list(gates.mean_beta()) == [0, 1, 2]
    for i, beta in expected.items():
        found = gates.statistics()[i]
        assert found["written"] == beta.numel()
        assert gates.mean_beta()[i].dtype == torch.float32
        assert relative_error(gates.mean_beta()[i], beta.mean()) < 1e-5
        assert found["mean"] == pytest.approx(beta.mean().item(), rel=1e-5)
        assert found["std"] == pytest.approx(beta.std(correction=0).item(), rel=1e-3)
        assert (found["min"], found["max"]) == pytest.approx((beta.min().item(), beta.max().item()), rel=1e-4)
        share = ((beta > 0.99) | (beta < 0.01)).float().mean().item()
        assert found["open"] + found["shut"] == pytest.approx(share) == gates.saturated()[i].item()
    assert any(row["open"] + row["shut"] > 0 for row in gates.statistics().values())
    expected = torch.stack([(beta.mean() - 0.05) ** 2 for beta in expected.values()]).mean()
    assert relative_error(gates.penalty(), expected) < 1e-5


def test_the_penalty_is_differentiable():
    model = patched()
    with record_gates() as gates:
        model(IDS, use_cache=False)
    bias = model.model.layers[1].self_attn.delta_memory.beta_bias
    gradient = torch.autograd.grad(gates.penalty(0.2), bias)[0]
    # The last layer's β depends on layer 1's bias through the hidden states; a difference quotient knows of both.
    step = torch.zeros_like(bias)
    step[3] = 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            bias += sign * step
        with torch.no_grad(), record_gates() as gates:
            model(IDS, use_cache=False)
        values.append(gates.penalty(0.2).item())
        with torch.no_grad():
            bias -= sign * step
    assert gradient[3].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)


def test_segments_count_once():
    model = patched(DeltaMemConfig.ssw())
    segments = torch.tensor([[0, 0, 0, 2, 2, 2, -1, -1, -1], [-1] * 9])
    with record_gates() as gates:
        model(IDS, segment_ids=segments, use_cache=False)
    assert all(row["written"] == 2 * 8 for row in gates.statistics().values())
    seen = []

    def look(attention, args, kwargs):
        raw, bias = attention.delta_memory.project(kwargs["hidden_states"][0])
        means = torch.stack([raw[:3].mean(0), raw[3:6].mean(0)])
        seen.append(split_projections(means, bias, attention.delta_memory.rule)[-1].mean())

    model.model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    model(IDS, segment_ids=segments, use_cache=False)
    assert relative_error(gates.mean_beta()[0], seen[0]) < 1e-5


def test_what_is_not_written_does_not_count():
    model = patched()
    memory = MemoryState.zeros(model, 2)
    memory.frozen = True
    with record_gates() as gates:
        model(IDS, memory=memory)
    assert gates.mean_beta() == {} == gates.statistics()
    with pytest.raises(ValueError, match="record_gates: no forward of a patched model has written"):
        gates.penalty()
    with record_gates() as gates:
        model(IDS, token_mask=torch.zeros_like(IDS).bool(), use_cache=False)
    assert gates.penalty().item() == 0 and gates.statistics()[0] == {"written": 0}
    with pytest.raises(ValueError, match="target: got 5, allowed 0 to 1"):
        gates.penalty(5)


def test_tokens_that_are_not_finite_do_not_count():
    model = patched(num_hidden_layers=1)
    embeds = model.get_input_embeddings()(IDS).detach()
    with record_gates() as clean:
        model(inputs_embeds=embeds[:, :-1], use_cache=False)
    embeds[:, -1] = float("nan")
    with record_gates() as gates:
        model(inputs_embeds=embeds, use_cache=False)
    assert torch.equal(gates.mean_beta()[0], clean.mean_beta()[0])
    gradient = torch.autograd.grad(gates.penalty(), model.model.layers[0].self_attn.delta_memory.beta_bias)[0]
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("differentiable", (False, True))
def test_forwards_add_up_decode_too(differentiable):
    model = patched()
    with torch.set_grad_enabled(differentiable):
        memory, split = MemoryState.zeros(model, 2), MemoryState.zeros(model, 2)
        with record_gates() as whole:
            model(IDS, memory=memory, use_cache=True)
        with record_gates() as parts:
            cache = model(IDS[:, :7], memory=split, use_cache=True).past_key_values
            for t in (7, 8):
                model(IDS[:, t : t + 1], memory=split, past_key_values=cache)
    for i, row in whole.statistics().items():
        assert row == pytest.approx(parts.statistics()[i], rel=1e-4)
        assert whole.mean_beta()[i].requires_grad is differentiable
        assert relative_error(split[i], memory[i]) < 1e-5


def test_recording_belongs_to_its_context():
    model = patched()
    started, done = threading.Event(), threading.Event()

    def other():
        started.wait(30)
        with torch.no_grad():
            model(IDS, use_cache=False)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with record_gates() as outer:
        started.set()
        assert done.wait(60)
        assert outer.mean_beta() == {}
        with record_gates() as inner:
            model(IDS, use_cache=False)
    thread.join()
    model(IDS, use_cache=False)
    assert outer.mean_beta() == {} and inner.statistics()[0]["written"] == 2 * 9 * 8


def conversation(model, frozen):
    """Logits of a padded prompt and two more tokens, and the memory after them."""
    memory = MemoryState.zeros(model, 2)
    if frozen:
        model(IDS.flip(1), memory=memory, use_cache=False)
        memory.frozen = True
    out = model(IDS, attention_mask=MASK, memory=memory)
    logits, mask = [out.logits], MASK
    for token in (5, 6):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        cache = out.past_key_values
        out = model(torch.full((2, 1), token), attention_mask=mask, memory=memory, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat([x.flatten() for x in (*logits, *(memory[i] for i in range(3)))])


@pytest.mark.parametrize("frozen", (False, True), ids=("live", "frozen"))
@pytest.mark.parametrize("backend", ("numba", "reference"))
@pytest.mark.parametrize("record", (record_gates, capture_projections))
@pytest.mark.parametrize("fused", (True, False), ids=("fused", "generic"))
def test_recording_changes_no_bit(fused, record, backend, frozen):
    model = patched(backend=backend)
    if not fused:  # a hook on a projection is what the generic path is for
        for layer in model.model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        expected = conversation(model, frozen)
        with record() as found:
            assert torch.equal(conversation(model, frozen), expected)
    if record is capture_projections:
        lengths = [raw[0].shape[1] for raw in found]
        assert lengths == ([9, 9, 1, 1] if frozen else [9, 1, 1])
    else:
        assert found.statistics()[0]["written"] == 8 * (2 * 9 if frozen else int(MASK.sum()) + 4)


def test_a_recomputation_does_not_count_again():
    model = patched().train()
    with record_gates() as plain:
        model(IDS, use_cache=False)
    wanted = torch.autograd.grad(plain.penalty(), model.model.layers[0].self_attn.delta_memory.beta_proj)[0]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with record_gates() as gates:
        loss = model(IDS, use_cache=False).logits.sum() * 0 + gates.penalty()
        loss.backward()
    assert gates.statistics() == plain.statistics()
    found = model.model.layers[0].self_attn.delta_memory.beta_proj.grad
    assert found.norm() > 0 and relative_error(found, wanted) < 1e-5
