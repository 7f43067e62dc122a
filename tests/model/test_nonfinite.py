"""NaN and Inf: what would leave them in a state is not written and counted; gradients of the rest are finite."""

import logging

import pytest
import torch
from support import loud_adapter, tiny_model

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model
from deltamem_fast.inspection.replay import replay
from deltamem_kernels.numba import ops as numba_backend
from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule

BACKENDS = (reference, numba_backend)
RULES = [
    DeltaRule(8),
    DeltaRule(3, 2, "standard", False, False, False),
    DeltaRule(3, 3, "lambda_outside", True, False),
    DeltaRule(3, 1, "no_lambda", True, True, False),
]
IDS = torch.arange(3, 15).repeat(3, 1)


def problem(rule: DeltaRule, length: int = 70, seed: int = 0):
    """Finite projections [2, T, W], bias and state, of which row 1 would get one head's state to Inf.

    Tokens 5 and 6, and 65 and 66, write the largest values there are under one key, of opposite signs, by open gates:
    to take the first one's back, the second would have to write twice as much.
    """
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, rule.width, generator=make)
    width = rule.read_width
    for t, value in ((5, 3.4e38), (6, -3.4e38), (65, 3.4e38), (66, -3.4e38)):
        if t < length:
            x[1, t, 2 * width - rule.rank : 2 * width] = 1.0
            x[1, t, 3 * width - 1] = value
            x[1, t, 3 * width :] = 9.0
    return x, torch.zeros(rule.bias_width), torch.randn(2, rule.heads, rule.rank, rule.rank, generator=make)


def bounded(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.double()
    return (tensor / (1 + tensor.abs())).sum()


def gradients(backend, rule, x, bias, state, **arguments):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, bias, state)]
    out = backend.scan(*leaves, rule, **arguments)
    return torch.autograd.grad(bounded(out.reads) + bounded(out.state), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_token_that_would_leave_inf_is_a_masked_token(backend, rule):
    x, bias, state = problem(rule)
    out = backend.scan(x, bias, state, rule, checkpoint_every=3)
    written = torch.ones(2, 70, dtype=torch.bool)
    # Found by the plain recurrence, token by token.
    factors = reference.split_projections(x, bias, rule)
    row = state[1:]
    for t in range(70):
        after = reference.delta_rule(*(f[1:, t : t + 1] for f in factors), row)[1][0]
        written[1, t] = torch.isfinite(after).all()
        row = after if written[1, t] else row
    assert not written.all() and written[1].any()
    masked = backend.scan(x, bias, state, rule, mask=written, checkpoint_every=3)
    for ours, theirs in zip((out.reads, out.state, out.checkpoints), (masked.reads, masked.state, masked.checkpoints)):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert torch.isfinite(out.state).all() and not out.reads[~written].any()
    assert out.skipped.tolist() == (~written).sum(1).tolist() and masked.skipped.tolist() == [0, 0]
    # Prefill is decode.
    stepped, skipped = state.clone(), torch.zeros(2, dtype=torch.int32)
    reads = [backend.step(x[:, t], bias, stepped, rule, skipped=skipped) for t in range(70)]
    assert torch.equal(skipped, out.skipped)
    for ours, theirs in ((stepped, out.state), (torch.stack(reads, 1), out.reads)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert backend is reference or torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    # Gradients, too; a raw q can still read more than float32 holds.
    wanted = gradients(backend, rule, x, bias, state, mask=written)
    for ours, theirs in zip(gradients(backend, rule, x, bias, state), wanted, strict=True):
        assert torch.isfinite(ours).all() or not rule.normalize
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("place", (0, -1))
def test_gate_biases_that_are_not_finite(backend, value, place):
    """NaN: no token is written. ±Inf is a gate that is open or shut for good, and finite."""
    rule = DeltaRule(3, 2, coupled=False)
    x, bias, state = problem(rule, 9)[0], torch.zeros(rule.bias_width), torch.ones(2, 2, 3, 3)
    x = x.clamp(-9, 9)
    bias[place] = value
    out = backend.scan(x, bias, state, rule)
    assert torch.isfinite(out.state).all() and torch.isfinite(out.reads).all()
    nan = value != value
    assert out.skipped.tolist() == ([9, 9] if nan else [0, 0])
    assert torch.equal(out.state, state) is nan
    assert all(torch.isfinite(g).all() for g in gradients(backend, rule, x, bias, state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sequence_of_several_in_a_pool(backend):
    rule = DeltaRule(8)
    x, bias, state = problem(rule, 12)
    pool = torch.cat([torch.zeros(1, 1, 8, 8), state])
    packed, cu = x.reshape(1, 24, -1), torch.tensor([0, 12, 24], dtype=torch.int32)
    slots = torch.tensor([1, 2], dtype=torch.int32)
    alone = backend.scan(x, bias, state, rule)
    both = backend.scan(packed, bias, pool, rule, cu_seqlens=cu, slots=slots)
    assert torch.equal(both.state, alone.state) and torch.equal(both.skipped, alone.skipped)
    assert alone.skipped[1] > 0 and alone.skipped[0] == 0


def test_the_inspection_replays_what_was_skipped():
    rule = DeltaRule(8)
    x, bias, state = problem(rule, 12)
    found = replay(x, bias.expand(2, -1), state, rule)
    out = reference.scan(x, bias, state, rule)
    assert torch.equal(found.final, out.state) and torch.isfinite(found.norms[:, 0]).all()


@pytest.mark.parametrize("backend", ("numba", "reference"))
def test_a_model_with_large_values(backend):
    """v near 3e38, raw keys: the state stays finite on both paths, in prefill, decode, packed and by segments."""
    config = DeltaMemConfig(normalize_qk=False)
    model = loud_adapter(patch_model(tiny_model(), config, backend=backend))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.delta_memory.memory_v_proj.mul_(1e38)
            layer.self_attn.delta_memory.delta_q_proj.zero_()
            layer.self_attn.delta_memory.delta_o_proj.zero_()
    for grad in (False, True):
        memory = MemoryState.zeros(model, 3)
        with torch.set_grad_enabled(grad):
            cache = model(IDS, memory=memory, use_cache=True).past_key_values
        counted = memory.skipped.clone()
        assert all(torch.isfinite(state).all() for _, state in memory.items()) and counted.min() > 0
        with torch.no_grad():
            model(IDS[:, :1], memory=memory.detach(), past_key_values=cache)
    with torch.no_grad():
        decoded = MemoryState.zeros(model, 3)
        cache = None
        for t in range(IDS.shape[1]):
            cache = model(IDS[:, t : t + 1], memory=decoded, past_key_values=cache, use_cache=True).past_key_values
        assert all(torch.isfinite(state).all() for _, state in decoded.items()) and decoded.skipped.min() > 0


def test_a_segment_whose_mean_is_not_finite_is_counted():
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1), DeltaMemConfig.ssw()))
    with torch.no_grad():
        model.model.layers[0].self_attn.delta_memory.memory_v_proj.mul_(2e38)
        memory = MemoryState.zeros(model, 3)
        model(IDS, memory=memory, segment_ids=torch.zeros_like(IDS))
    assert torch.isfinite(memory[0]).all() and memory.skipped.min() > 0


# --- tokens that come in as NaN


def broken_inputs(model):
    """Embeddings of IDS with NaN in row 1, place 5; the same with zeros there; the mask without it."""
    clean = model.model.embed_tokens(IDS).detach()
    broken, zeroed, mask = clean.clone(), clean.clone(), torch.ones_like(IDS)
    broken[1, 5], zeroed[1, 5], mask[1, 5] = float("nan"), 0.0, 0
    return broken, zeroed, mask


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("grad", (False, True))
def test_a_nan_token_stays_alone(attention, grad, caplog):
    model = loud_adapter(patch_model(tiny_model(attention=attention)))
    broken, zeroed, mask = broken_inputs(model)
    memory, masked = MemoryState.zeros(model, 3), MemoryState.zeros(model, 3)
    with torch.set_grad_enabled(grad), caplog.at_level(logging.WARNING, "deltamem_fast"):
        out = model(inputs_embeds=broken, memory=memory).logits
        expected = model(inputs_embeds=zeroed, token_mask=mask, memory=masked).logits
    assert out.isnan().any(-1).nonzero().tolist() == [[1, 5]]
    assert torch.equal(out[mask.bool()], expected[mask.bool()])
    assert all(torch.equal(memory[i], masked[i]) for i in memory)
    assert memory.skipped.tolist() == [0, 3, 0] and masked.skipped.sum() == 0
    assert len(caplog.records) == 1 and "1 token(s) are NaN or Inf, the first in row 1 at place 5" in caplog.text
    if grad:
        loss = out[mask.bool()].logsumexp(-1).sum() + sum(bounded(state) for _, state in memory.items())
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if ".delta_memory." in n and p.grad is not None}
        assert found and all(torch.isfinite(gradient).all() for gradient in found.values())


def test_a_nan_row_of_the_embeddings_and_packed_sequences():
    model = loud_adapter(patch_model(tiny_model()))
    with torch.no_grad():
        before = model(IDS).logits
        model.model.embed_tokens.weight[8] = float("nan")  # IDS[:, 5]
        memory = MemoryState.zeros(model, 3)
        out = model(IDS, memory=memory, attention_mask=torch.ones_like(IDS)).logits
        assert out.isnan().any(-1).nonzero().tolist() == [[0, 5], [1, 5], [2, 5]]
        assert torch.equal(out[:, :5], before[:, :5]) and memory.skipped.tolist() == [3, 3, 3]
        starts = torch.tensor([0, 4, 12], dtype=torch.int32)
        packed = MemoryState.zeros(model, 2)
        places = torch.cat([torch.arange(4), torch.arange(8)])[None]
        given = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 8, "max_length_k": 8}
        out = model(IDS[:1], memory=packed, position_ids=places, use_cache=False, **given).logits
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 5]] and packed.skipped.tolist() == [0, 3]
    assert all(torch.isfinite(state).all() and state[0].any() for _, state in packed.items())


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_nan_token_under_checkpointing(reentrant):
    model = loud_adapter(patch_model(tiny_model()))
    broken, _, mask = broken_inputs(model)
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        memory = MemoryState.zeros(model, 3)
        out = model(inputs_embeds=broken, memory=memory, use_cache=False).logits
        (out[mask.bool()].logsumexp(-1).sum() + sum(bounded(state) for _, state in memory.items())).backward()
        assert memory.skipped.tolist() == [0, 3, 0]
        weights = [p for n, p in model.named_parameters() if ".delta_memory." in n]
        found.append([p.grad.clone() for p in weights if p.grad is not None])
    for plain, ours in zip(*found, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_frozen_memories_count_nothing():
    model = loud_adapter(patch_model(tiny_model()))
    broken, _, _ = broken_inputs(model)
    memory = MemoryState.zeros(model, 3)
    memory.frozen = True
    with torch.no_grad():
        out = model(inputs_embeds=broken, memory=memory).logits
    assert out.isnan().any(-1).nonzero().tolist() == [[1, 5]] and memory.skipped.sum() == 0


def test_a_nan_row_of_the_embeddings_in_compiled_forwards():
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = float("nan")  # IDS[:, 5]
        loud_adapter(patch_model(model, backend="reference"))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        memory, wanted = MemoryState.zeros(model, 3), MemoryState.zeros(model, 3)
        out = compiled(IDS, memory=memory, use_cache=False).logits
        expected = model(IDS, memory=wanted, use_cache=False).logits
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 5], [1, 5], [2, 5]]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert memory.skipped.tolist() == wanted.skipped.tolist() == [1, 1, 1]


# --- what turns to NaN inside the layers


@pytest.mark.parametrize("path", ("fast", "generic"))
@pytest.mark.parametrize("backend", ("reference", "numba"))
@pytest.mark.parametrize(("dtype", "value"), ((torch.float32, 3e38), (torch.float16, 1e6)), ids=("reads", "float16"))
def test_what_overflows_in_the_layers_stays_in_its_row_and_is_counted(dtype, value, backend, path, caplog):
    model = loud_adapter(patch_model(tiny_model(dtype=dtype), backend=backend))
    if path == "generic":
        for layer in model.model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda *arguments: None)
    memory, clean = MemoryState.zeros(model, 3), MemoryState.zeros(model, 3)
    memory[0][1] = value
    with torch.no_grad():
        found = model(IDS, memory=memory, use_cache=False).logits
        wanted = model(IDS, memory=clean, use_cache=False).logits
    assert found.isnan().any(-1).any(-1).tolist() == [False, True, False]
    assert torch.equal(found[::2], wanted[::2])
    for i in memory:
        assert torch.isfinite(memory[i]).all() and torch.equal(memory[i][::2], clean[i][::2])
    assert memory.skipped[1] > 0 and memory.skipped[::2].tolist() == [0, 0]
    memory[0][1] = value
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        model.generate(IDS, memory=memory, max_new_tokens=2, do_sample=False)
        model.generate(IDS, memory=clean, max_new_tokens=2, do_sample=False)
    (record,) = caplog.records
    assert "pairs were left out of the memory" in record.getMessage()


@pytest.mark.parametrize("backend", ("reference", "numba"))
def test_a_count_past_its_last_number_stays_at_it(backend, tmp_path):
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=2), backend=backend))
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = float("nan")  # IDS[:, 5]
    memory, most = MemoryState.zeros(model, 3), 2**31 - 1
    for layer in memory:
        memory.count(layer, torch.tensor([most, most - 1, 0], dtype=torch.int32))
    for ids in (IDS, IDS[:, 5:6]):  # a prompt, and a token that is written in place
        counters = memory.counters()
        with torch.no_grad():
            model(ids, memory=memory, use_cache=False)
        assert memory.skipped_since(counters) == 6
    assert memory.skipped.tolist() == [most, most, 4]
    assert [[row.skipped for row in memory.report(n)] for n in range(3)] == [[most] * 2, [most] * 2, [2] * 2]
    memory.save(tmp_path / "memory.safetensors")
    loaded = MemoryState.load(tmp_path / "memory.safetensors", model)
    assert loaded.counters().tolist() == [[most, most, 2]] * 2
    memory.zero_()
    assert memory.counters().tolist() == [[0, 0, 0]] * 2


def test_what_generate_left_out_is_told_past_the_last_count(caplog):
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=2)))
    memory = MemoryState.zeros(model)
    for layer in memory:
        memory.count(layer, torch.tensor([2**31 - 1], dtype=torch.int32))
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = float("nan")
    model.generate(IDS[:1], memory=memory, max_new_tokens=1)
    assert "generate: 2 (token, layer) pairs were left out" in caplog.text
