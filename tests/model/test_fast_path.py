"""The fast path: the same numbers as the generic one, packed weights that nobody notices, and when it steps aside."""

import copy
import functools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import loud_adapter, relative_error, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from deltamem_fast import (
    DeltaMemConfig,
    MemoryState,
    layer_paths,
    load_adapter,
    memory_disabled,
    memory_state,
    patch_model,
    save_adapter,
    unpatch_model,
)
from deltamem_fast.model import families
from deltamem_kernels.numba import heads as numba_heads

FAMILIES = ("qwen3", "smollm3", "llama", "mistral", "qwen2")
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(7))
EVERYTHING = DeltaMemConfig(
    delta_heads=("q", "k", "v", "o"), delta_o_rmsnorm=True, trainable_delta_scale=True, couple_lambda=False,
    delta_scale_granularity="head",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def force_generic(model):
    """The same model with every layer on the generic path."""
    for attention in model._delta_memory_patch.attentions.values():
        attention.delta_memory.weights.reason = "this test wants the generic path"
    return model


def run(model, ids=IDS, split=13, **kwargs):
    """Logits of a prefill and of a decode of the rest, token by token, and the memory."""
    cache = DynamicCache(config=model.config)
    out = [model(ids[:, :split], past_key_values=cache, **kwargs).logits]
    for t in range(split, ids.shape[1]):
        out.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(out, 1), memory_state(cache)


def both(family="qwen3", config=None, dtype=torch.float32, backend="auto", attention="sdpa", **changes):
    """A model on the fast path, and one with the same weights on the generic path."""
    fast = loud_adapter(patch_model(tiny_model(family, attention, dtype, **changes), config, backend=backend))
    generic = copy.deepcopy(fast)
    assert {p.path for p in layer_paths(fast).values()} == {"fast"}, layer_paths(fast)
    return fast, force_generic(generic)


def oracle_of(model, config, family, **changes):
    """The same weights in float64, on the generic path with the reference backend."""
    exact = patch_model(tiny_model(family, "eager", torch.float64, **changes), config, backend="reference")
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    return exact


@pytest.mark.parametrize("config", (None, EVERYTHING, DeltaMemConfig.msw(heads=3, rank=3)), ids=("qo", "all", "msw"))
@pytest.mark.parametrize("backend", ("numba", "reference"))
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_the_generic_path(family, backend, config):
    fast, generic = both(family, config, backend=backend)
    ours, theirs = run(fast), run(generic)
    assert relative_error(ours[0], theirs[0]) < 1e-5
    assert all(relative_error(ours[1][i], theirs[1][i]) < 1e-5 for i in theirs[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family", ("qwen3", "smollm3"))
def test_error_budget_against_float64(family, dtype):
    """The fused forward is no further from float64 than the class's own operations are."""
    fast, generic = both(family, EVERYTHING, dtype, attention="eager")
    exact = oracle_of(fast, EVERYTHING, family)
    oracle = run(exact)[0]
    error, budget = (relative_error(run(model)[0], oracle) for model in (fast, generic))
    assert error <= 1.5 * budget + 4 * torch.finfo(dtype).eps, (error, budget)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    head_dim=st.sampled_from([8, 16, 24]),
    rank=st.sampled_from((1, 3, 8, 12)),  # those of the other files too: for each the loops are compiled
    memory_heads=st.integers(1, 3),
    delta=st.sets(st.sampled_from("qkvo"), min_size=1),
    padding=st.integers(0, 4),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(heads, head_dim, rank, memory_heads, delta, padding, batch, bias, seed):
    config = DeltaMemConfig(rank=rank, num_state_heads=memory_heads, delta_heads=tuple(h for h in "qkvo" if h in delta))
    changes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head_dim}
    fast, generic = both("qwen3", config, attention_bias=bias, num_hidden_layers=2, **changes)
    ids = torch.randint(3, 128, (batch, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    ours, theirs = (run(model, ids, 10, attention_mask=mask[:, :10]) for model in (fast, generic))
    real = mask.bool()
    assert relative_error(ours[0][real], theirs[0][real]) < 1e-5
    for i, state in theirs[1].items():
        # Of rank 1 it is one number, a sum of which little may be left; what is summed is of size 1.
        assert (ours[1][i] - state).norm() < 1e-5 * max(state.norm(), 1.0)


def test_frozen_segments_and_the_callers_memory():
    fast, generic = both(config=DeltaMemConfig(memory_write_granularity="message_mean"))
    states = []
    for model in (fast, generic):
        memory = MemoryState.zeros(model, 2)
        segments = torch.arange(20).div(6, rounding_mode="floor").expand(2, -1)
        model(IDS, memory=memory, segment_ids=segments)
        before = memory.clone()
        memory.frozen = True
        first = model(IDS[:, :7], memory=memory).logits
        one = model(IDS[:, :1], memory=memory).logits
        assert all(torch.equal(before[i], memory[i]) for i in memory) and memory[0].norm() > 0
        states.append((before, first, one))
    (ours, *a), (theirs, *b) = states
    assert all(relative_error(ours[i], theirs[i]) < 1e-5 for i in theirs)
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(a, b))


def test_static_cache_keeps_addresses_and_agrees():
    fast, generic = both()
    static = StaticCache(config=fast.config, max_cache_len=24)
    out = [fast(IDS[:, :13], past_key_values=static).logits]
    address = memory_state(static)[0].data_ptr()
    out += [fast(IDS[:, t : t + 1], past_key_values=static).logits for t in range(13, 20)]
    assert memory_state(static)[0].data_ptr() == address
    assert relative_error(torch.cat(out, 1), run(generic)[0]) < 1e-5


def test_a_token_that_is_not_finite_and_an_ended_row():
    fast, generic = both()
    for model in (fast, generic):
        model.model.embed_tokens.weight[1] = float("nan")  # a token that no row holds
    ids = IDS.clone()
    ids[0, -1] = 1
    ours, theirs = run(fast, ids)[1], run(generic, ids)[1]
    assert ours.skipped.tolist() == theirs.skipped.tolist() == [3, 0]
    assert all(torch.isfinite(ours[i]).all() and relative_error(ours[i], theirs[i]) < 1e-5 for i in ours)
    out = [m.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=[9, 50, 70]) for m in both()]
    assert torch.equal(*out)


# --- packed storage


def storage(parameter):
    return parameter.untyped_storage().data_ptr()


def is_packed(model):
    """Whether q, k, v and the memory's rows of every layer lie one behind another."""
    found = []
    for layer in model.model.layers:
        attention = layer.self_attn
        memory = attention.delta_memory
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        parts += [memory.memory_q_proj, memory.memory_k_proj, memory.memory_v_proj, memory.beta_proj]
        ends = [part.data_ptr() + part.nbytes for part in parts]
        found.append(ends[:-1] == [part.data_ptr() for part in parts[1:]])
    return all(found)


def test_weights_lie_in_one_tensor_without_extra_memory():
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sizes = sum({storage(p): p.untyped_storage().nbytes() for p in model.parameters()}.values())
    patch_model(model)
    assert is_packed(model)
    adapter = sum(p.numel() * 4 for n, p in model.named_parameters() if "delta_memory" in n)
    packed = sum({storage(p): p.untyped_storage().nbytes() for p in model.parameters()}.values())
    assert packed == sizes + adapter
    # For whoever looks, each has a storage of its own.
    storages = [p.untyped_storage() for p in model.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert all(s.nbytes() == p.nbytes and p.storage_offset() == 0 for s, p in zip(storages, model.parameters()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)
    unpatch_model(model)
    assert sum({storage(p): p.untyped_storage().nbytes() for p in model.parameters()}.values()) == sizes
    assert list(model.state_dict()) == list(before)
    assert len({storage(p) for p in model.parameters()}) == len({p.data_ptr() for p in model.parameters()})


def test_files_notice_nothing(tmp_path):
    model = loud_adapter(patch_model(tiny_model()))
    expected = run(model)[0]
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    torch.save(model.state_dict(), tmp_path / "all.pt")
    loaded = load_file(tmp_path / "all.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())
    unpickled = torch.load(tmp_path / "all.pt", weights_only=True)
    assert all(torch.equal(v, unpickled[k]) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa", dtype=torch.float32)
    again = patch_model(again.eval(), tmp_path / "model")
    assert is_packed(again) and torch.equal(run(again)[0], expected)


@pytest.mark.parametrize("change", ("to and back", "deepcopy", "data", "load", "assign", "adapter"))
def test_moved_weights_are_packed_again(change, tmp_path):
    other = loud_adapter(patch_model(tiny_model(seed=5)), seed=9)
    model = loud_adapter(patch_model(tiny_model()))
    expected = run(other)[0]
    first = run(model)[0]
    if change == "to and back":
        model.to(torch.float64).to(torch.float32)
        expected = first
    elif change == "deepcopy":
        copied = copy.deepcopy(model)
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        model, expected = copied, first
    elif change == "data":
        for mine, theirs in zip(model.parameters(), other.parameters()):
            mine.data = theirs.data.clone()
    elif change == "load":
        model.load_state_dict(other.state_dict())
    elif change == "assign":
        model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    else:
        save_adapter(other, tmp_path)
        load_adapter(model, tmp_path)
        for mine, theirs in zip(model.parameters(), other.parameters()):
            mine.copy_(theirs)
    assert relative_error(run(model)[0], expected) < 1e-6
    assert is_packed(model) and {p.path for p in layer_paths(model).values()} == {"fast"}
    # A write to a parameter is a write to what the matmul reads.
    model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    model.model.layers[1].self_attn.delta_memory.memory_v_proj.data.mul_(0.5)
    assert relative_error(run(model)[0], run(force_generic(copy.deepcopy(model)))[0]) < 1e-5


def test_replaced_parameters_are_seen():
    fast, _ = both(config=EVERYTHING)
    run(fast)
    memory = fast.model.layers[0].self_attn.delta_memory
    for name in ("delta_q_proj", "delta_o_proj", "delta_scale_raw", "beta_bias", "memory_k_proj"):
        setattr(memory, name, torch.nn.Parameter(getattr(memory, name) * 1.5))
    fast.model.layers[0].self_attn.q_norm.weight.data = fast.model.layers[0].self_attn.q_norm.weight * 2
    assert relative_error(run(fast)[0], run(force_generic(copy.deepcopy(fast)))[0]) < 1e-5


def test_two_dtypes_one_after_the_other():
    model = loud_adapter(patch_model(tiny_model()))
    first = run(model)[0]
    assert relative_error(run(model.to(torch.bfloat16))[0], first) < 3e-2
    assert is_packed(model)
    with memory_disabled(model):
        bare = unpatch_model(copy.deepcopy(model))
        assert torch.equal(model(IDS).logits, bare(IDS).logits)


# --- stepping aside


def reasons(model):
    return {p.reason for p in layer_paths(model).values()}


def test_reasons():
    model = loud_adapter(patch_model(tiny_model()))
    expected = run(model)[0]
    attention = model.model.layers[0].self_attn
    handle = attention.q_proj.register_forward_hook(lambda *_: seen.append(1))
    seen = []
    assert relative_error(run(model)[0], expected) < 1e-5 and seen
    assert reasons(model) == {"", "q_proj has hooks"}
    handle.remove()
    assert reasons(model) == {""}
    model.model.layers[1].self_attn.delta_memory.to(torch.float64)
    assert "memory_q_proj is torch.float64" in layer_paths(model)[1].reason
    assert "FloatAttention" in families.why_generic(FloatAttention(), attention.delta_memory)
    odd = patch_model(tiny_model(hidden_size=66, head_dim=16))
    assert all("multiple of 64 bytes" in reason for reason in reasons(odd))
    assert relative_error(run(odd)[0], run(force_generic(copy.deepcopy(odd)))[0]) < 1e-6


class FloatAttention(torch.nn.Module):
    pass


def test_a_forward_that_computes_something_else(monkeypatch):
    model = tiny_model()
    kind = type(model.model.layers[0].self_attn)
    own = kind.forward

    def forward(self, hidden_states, **kwargs):
        return own(self, hidden_states * self.gate, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    kind.gate = 1.0
    try:
        patched = patch_model(model)
        assert reasons(patched) == {"Qwen3Attention.forward was replaced"}
        run(patched)
    finally:
        del kind.gate


def said(model):
    """Logits of a prompt and of a decoded token, of a patched or a bare model."""
    cache = DynamicCache(config=model.config)
    return torch.cat([model(ids, past_key_values=cache).logits for ids in (IDS[:, :12], IDS[:, 12:13])], 1)


def halved(function):
    """``function`` with its first result halved: stands for a kernel that computes something else."""

    @functools.wraps(function)  # looks like the original by every name
    def forward(*args, **kwargs):
        found = function(*args, **kwargs)
        return (found[0] / 2, *found[1:]) if isinstance(found, tuple) else found / 2

    return forward


def replaced_parts(model):
    """(owner, name) of what the fused forward goes past."""
    attention = model.model.layers[0].self_attn
    family = sys.modules[type(attention).__module__]
    found = [(family, "apply_rotary_pos_emb"), (family, "rotate_half"), (type(attention), "forward")]
    found += [(torch.nn.Linear, "forward"), (torch.nn.functional, "linear"), (torch.nn.Linear, "__call__")]
    return found + ([(type(attention.q_norm), "forward")] if hasattr(attention, "q_norm") else [])


@pytest.mark.parametrize("family", ("qwen3", "llama"))
@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("place", range(7))
def test_functions_that_were_replaced_are_not_gone_past(family, when, place, monkeypatch):
    models = [tiny_model(family) for _ in range(2)]
    parts = replaced_parts(models[0])
    if place >= len(parts):
        pytest.skip("llama has no norms over its heads")
    owner, name = parts[place]
    plain, patched = models
    if when == "after":
        patch_model(patched, DeltaMemConfig(output_init="zero"))
        run(patched)
    before = said(plain)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, halved(getattr(owner, name)))
        if when == "before":
            patch_model(patched, DeltaMemConfig(output_init="zero"))
        wanted, ours = said(plain), said(patched)
        assert relative_error(before, wanted) > 1e-3
        assert relative_error(ours, wanted) < 1e-5
        assert all(name in reason and "replaced" in reason for reason in reasons(patched))
    assert relative_error(said(patched), before) < 1e-5
    assert reasons(patched) == {""}


def test_norms_with_different_eps():
    plain, patched = tiny_model(), patch_model(tiny_model(), DeltaMemConfig(output_init="zero"))
    run(patched)
    for model in (plain, patched):
        for layer in model.model.layers:
            layer.self_attn.k_norm.variance_epsilon = 0.5
    assert relative_error(said(patched), said(plain)) < 1e-5
    assert reasons(patched) == {"q_norm and k_norm have different variance_epsilon"}
    for model in (plain, patched):
        for layer in model.model.layers:
            layer.self_attn.q_norm.variance_epsilon = 0.5
    assert relative_error(said(patched), said(plain)) < 1e-5
    assert reasons(patched) == {""}


def test_a_function_that_a_kernel_of_the_hub_may_replace(monkeypatch):
    family = sys.modules["transformers.models.qwen3.modeling_qwen3"]
    own = family.apply_rotary_pos_emb

    class Func(torch.nn.Module):  # as the package ``kernels`` wraps it
        def forward(self, *args, **kwargs):
            return own(*args, **kwargs)

    function = Func()
    monkeypatch.setattr(family, "apply_rotary_pos_emb", function)
    plain, patched = tiny_model(), patch_model(tiny_model(), DeltaMemConfig(output_init="zero"))
    assert relative_error(said(patched), said(plain)) < 1e-5 and reasons(patched) == {""}
    function.forward = halved(own)
    assert relative_error(said(patched), said(plain)) < 1e-5
    assert reasons(patched) == {"transformers.models.qwen3.modeling_qwen3.apply_rotary_pos_emb was replaced"}


def test_forwards_of_classes_that_are_replaced_after_patching(monkeypatch):
    plain, patched = tiny_model(), patch_model(tiny_model(), DeltaMemConfig(output_init="zero"))
    for owner in (type(plain), type(plain.model)):

        def forward(self, *args, own=owner.forward, **kwargs):
            out = own(self, *args, **kwargs)
            out[0].mul_(0.5)
            return out

        monkeypatch.setattr(owner, "forward", forward)
    with torch.no_grad():  # what such a wrapper takes by position, the one from before knows
        assert torch.equal(patched(IDS, None).logits, patched(input_ids=IDS).logits)
        assert torch.equal(patched.model(IDS, None)[0], patched.model(input_ids=IDS)[0])
    assert relative_error(said(patched), said(plain)) < 1e-5


def test_lora_takes_the_generic_path_and_back():
    peft = pytest.importorskip("peft")
    model = loud_adapter(patch_model(tiny_model()))
    expected = run(model)[0]
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert all("q_proj is a" in reason for reason in reasons(model))
    assert relative_error(run(model)[0], expected) > 1e-3
    lora.unload()
    assert reasons(model) == {""} and relative_error(run(model)[0], expected) < 1e-6


def test_autograd_and_autocast_take_the_generic_path():
    model = loud_adapter(patch_model(tiny_model()))
    with torch.enable_grad():
        loss = model(IDS, use_cache=False).logits.square().mean()
        loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    assert model.model.layers[0].self_attn.delta_memory.memory_k_proj.grad.norm() > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.step()
    assert is_packed(model)
    assert relative_error(run(model)[0], run(force_generic(copy.deepcopy(model)))[0]) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(IDS).logits).all()


def test_shared_storage_is_left_alone():
    model = tiny_model()
    flat = torch.cat([p.detach().flatten() for p in model.model.layers[0].self_attn.q_proj.parameters()] * 2)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = flat[: weight.numel()].view_as(weight)
    patch_model(model)
    assert storage(weight) == flat.untyped_storage().data_ptr()
    assert "view of a storage" in layer_paths(model)[0].reason and layer_paths(model)[1].path == "fast"


def test_inference_mode():
    model = loud_adapter(patch_model(tiny_model()))
    expected = run(model)[0]
    with torch.inference_mode():
        assert torch.equal(run(model)[0], expected)
        fresh = loud_adapter(patch_model(tiny_model()))
        assert torch.equal(run(fresh)[0], expected)
    assert torch.equal(run(fresh)[0], expected)


def test_output_attentions():
    fast, generic = both(attention="eager")
    ours, theirs = (m(IDS, output_attentions=True).attentions for m in (fast, generic))
    assert len(ours) == 3 and all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs))


@pytest.mark.parametrize("prefill", (1, 2, 19))
def test_any_split_of_the_tokens(prefill):
    fast, _ = both()
    whole = run(fast, split=20)
    parts = run(fast, split=prefill)
    assert relative_error(parts[0], whole[0]) < 1e-5
    assert all(relative_error(parts[1][i], whole[1][i]) < 1e-5 for i in whole[1])


def test_names_that_the_forward_uses_are_known():
    """One that a newer transformers adds must be looked at before the fused forward takes its place."""
    for family in FAMILIES:
        attention = tiny_model(family).model.layers[0].self_attn
        assert families.shape_of(attention) is not None


# --- what was seen to go wrong once


def generic_twin(model):
    return force_generic(copy.deepcopy(model))


def assert_right(model):
    assert relative_error(run(model)[0], run(generic_twin(model))[0]) < 1e-5


@pytest.mark.parametrize("name", ("beta_bias", "lambda_bias"))
@pytest.mark.parametrize("how", ("data", "parameter"))
def test_a_gate_bias_replaced_after_the_first_token(name, how):
    fast, _ = both(config=DeltaMemConfig(couple_lambda=False))
    run(fast)
    memory = fast.model.layers[1].self_attn.delta_memory
    if how == "data":
        getattr(memory, name).data = getattr(memory, name) + 2
    else:
        setattr(memory, name, torch.nn.Parameter(getattr(memory, name) + 2))
    assert_right(fast)


def test_threads_share_a_model():
    """Two conversations at once, many times: each memory is as if it had been alone."""
    from concurrent.futures import ThreadPoolExecutor

    model = loud_adapter(patch_model(tiny_model()))
    prompts = [torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(n)) for n in range(24)]

    def converse(ids):
        with torch.no_grad():
            return run(model, ids, 4)

    alone = [converse(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(converse, prompts))
    for (logits, memory), (expected, own) in zip(together, alone):
        assert torch.equal(logits, expected) and all(torch.equal(memory[i], own[i]) for i in own)


def test_storage_that_somebody_laid_out_is_left_alone():
    model = loud_adapter(patch_model(tiny_model()))
    run(model)
    attention = model.model.layers[0].self_attn
    weight, rows = attention.q_proj.weight, attention.delta_memory.memory_k_proj
    flat = torch.cat([weight.flatten(), rows.flatten()])
    weight.data, rows.data = flat[: weight.numel()].view_as(weight), flat[weight.numel() :].view_as(rows)
    before = run(model)[0]
    assert storage(weight) == storage(rows) == flat.untyped_storage().data_ptr()
    assert "view of a storage" in layer_paths(model)[0].reason
    flat.mul_(0.5)
    assert relative_error(run(model)[0], before) > 1e-3
    assert_right(model)
    shared = loud_adapter(patch_model(tiny_model()))
    shared.share_memory()
    run(shared)
    assert all(p.is_shared() for p in shared.parameters())


def test_a_float32_adapter_on_a_bfloat16_backbone():
    model = loud_adapter(patch_model(tiny_model(dtype=torch.bfloat16)))
    first = run(model)[0]
    for layer in model.model.layers:
        layer.self_attn.delta_memory.float()
    assert relative_error(run(model)[0], first) < 3e-2
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert {p.path for p in layer_paths(model).values()} == {"generic"}


def test_tied_and_added_weights():
    model = loud_adapter(patch_model(tiny_model()))
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    run(model)
    attention.k_proj.weight.mul_(1.5)
    assert "one parameter" in layer_paths(model)[0].reason
    assert_right(model)
    other = model.model.layers[1].self_attn
    other.q_proj.bias = torch.nn.Parameter(torch.randn(other.q_proj.out_features))
    assert_right(model)
    other.q_proj.bias = None
    assert_right(model)


def test_hooks_on_all_modules_and_changed_classes():
    fast, _ = both()
    expected = run(fast)[0]
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert relative_error(run(fast)[0], expected) < 1e-5
    finally:
        handle.remove()
    assert seen.count(torch.nn.Linear) == 8 * (3 * 7 + 1)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    fast.model.layers[0].self_attn.q_proj.__class__ = Doubled
    assert "Doubled" in layer_paths(fast)[0].reason
    assert relative_error(run(fast)[0], expected) > 1e-3
    fast, _ = both()
    attention = fast.model.layers[1].self_attn
    attention.__class__ = type("Sharded", (type(attention),), {})  # as FSDP does
    assert "Sharded is not one of the attentions" in layer_paths(fast)[1].reason
    assert relative_error(run(fast)[0], expected) < 1e-5


def test_pruned_and_replaced_linears():
    from torch.nn.utils import prune

    model = loud_adapter(patch_model(tiny_model()))
    attention = model.model.layers[0].self_attn
    prune.l1_unstructured(attention.q_proj, "weight", 0.3)
    pruned = run(model)[0]
    prune.remove(attention.q_proj, "weight")
    assert relative_error(run(model)[0], pruned) < 1e-5
    linear = torch.nn.Linear(64, 64, bias=False)
    linear.weight.copy_(model.model.layers[1].self_attn.q_proj.weight)
    expected = run(model)[0]
    model.model.layers[1].self_attn.q_proj = linear
    assert "replaced after patching" in layer_paths(model)[1].reason
    assert relative_error(run(model)[0], expected) < 1e-5
    model.load_state_dict(model.state_dict())  # a look at the model's weights, which packs what is there
    assert layer_paths(model)[1].path == "fast"
    assert relative_error(run(model)[0], expected) < 1e-5


def test_functional_call_borrows_nothing():
    model = loud_adapter(patch_model(tiny_model()))
    other = loud_adapter(patch_model(tiny_model(seed=4)), seed=5)
    given = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    places = {name: tensor.untyped_storage().data_ptr() for name, tensor in given.items()}
    before = run(model)[0]
    out = torch.func.functional_call(model, given, (IDS,), {"use_cache": False}).logits
    assert relative_error(out, other(IDS, use_cache=False).logits) < 1e-5
    assert places == {name: tensor.untyped_storage().data_ptr() for name, tensor in given.items()}
    assert relative_error(run(model)[0], before) < 1e-6


def test_tensors_without_storage_are_not_gone_to_by_address():
    fake = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode
    model = loud_adapter(patch_model(tiny_model(), backend="numba"))
    expected = run(model)[0]
    with fake(allow_non_fake_inputs=True):
        assert not numba_heads._loops_take(torch.empty(2, 4))  # it would write to address 0
        with pytest.raises(RuntimeError):
            model(IDS, use_cache=False)
    assert torch.equal(run(model)[0], expected)


def test_one_position_for_all_tokens():
    fast, generic = both(config=DeltaMemConfig(), attention="eager")
    position = torch.full((1, 1), 7)
    ids = torch.randint(3, 128, (2, 300), generator=torch.Generator().manual_seed(1))
    ours, theirs = (model(ids, position_ids=position, use_cache=False).logits for model in (fast, generic))
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("tokens", (1, 9), ids=("one token", "prompt"))
@pytest.mark.parametrize("path", ("fused", "generic"))
@pytest.mark.parametrize("backend", ("numba", "reference"))
def test_a_write_under_a_pending_backward_is_noticed(backend, path, tokens):
    model = loud_adapter(patch_model(tiny_model(), backend=backend))
    if path == "generic":
        for layer in model.model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    memory = MemoryState.zeros(model, 2)
    model(IDS, memory=memory, use_cache=False)
    with torch.enable_grad():
        loss = model(IDS, memory=memory.read_only(), use_cache=False).logits.square().mean()
    model(IDS[:, :tokens], memory=memory, use_cache=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ("numba", "reference"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_the_default_dtype_of_the_process_does_not_matter(dtype, backend):
    """Another thread may load a model in bfloat16 just now."""
    model = loud_adapter(patch_model(tiny_model(), backend=backend))
    model.requires_grad_(True)

    def everything():
        cache = DynamicCache(config=model.config)
        logits = [model(IDS, past_key_values=cache).logits, model(IDS[:, :1], past_key_values=cache).logits]
        memory = MemoryState.zeros(model, 2)
        model(IDS, memory=memory, use_cache=False)
        memory.frozen = True
        logits.append(model(IDS, memory=memory, use_cache=False).logits)
        with torch.enable_grad():
            model(IDS, memory=MemoryState.zeros(model, 2), use_cache=False).logits.square().mean().backward()
        gradient = model.model.layers[0].self_attn.delta_memory.memory_v_proj.grad.clone()
        model.zero_grad()
        return [*logits, *(memory[i] for i in memory), gradient]

    expected = everything()
    torch.set_default_dtype(dtype)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        ours.dtype == theirs.dtype and relative_error(ours, theirs) < 1e-6 for ours, theirs in zip(found, expected)
    )
