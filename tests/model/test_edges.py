"""Where a memory could go wrong without a word: it is right, or it raises."""

import io
import pickle

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StableLmConfig,
    StaticCache,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from deltamem_fast import (
    DeltaMemConfig,
    MemoryState,
    load_adapter,
    memory_disabled,
    memory_state,
    patch_model,
    save_adapter,
    unpatch_model,
)

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return loud_adapter(patch_model(tiny_model()))


def run(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def close(ours, theirs, tolerance=1e-5):
    return all(relative_error(ours[i], theirs[i]) < tolerance for i in theirs)


def remembered(model, ids=IDS, **kwargs):
    memory = MemoryState.zeros(model, ids.shape[0])
    run(model, ids, memory=memory, **kwargs)
    return memory


def test_layers_that_hand_nothing_down_are_refused():
    config = StableLmConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="StableLmDecoderLayer hands no keyword arguments on to its self_attn"):
        patch_model(AutoModelForCausalLM.from_config(config).eval())


def test_an_attention_without_keyword_arguments_is_refused():
    class Attention(torch.nn.Module):
        layer_idx = 0

        def __init__(self):
            super().__init__()
            self.q_proj = self.o_proj = torch.nn.Linear(4, 4)

        def forward(self, hidden_states):
            return hidden_states

    class Layer(torch.nn.Module):
        config = StableLmConfig()

        def __init__(self):
            super().__init__()
            self.self_attn = Attention()

        def forward(self, x, **kwargs):
            return self.self_attn(x)

    with pytest.raises(ValueError, match="the attention Attention takes no keyword arguments beyond its own"):
        patch_model(Layer())


def test_an_attention_that_runs_without_its_memory_is_noticed(model):
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, memory=None, **kwargs: type(layer).forward(layer, hidden_states, **kwargs)
    try:
        with pytest.raises(RuntimeError, match=r"attention of layers \[1\] ran without its memory"):
            run(model)
    finally:
        del layer.forward


@pytest.mark.parametrize("kind", ("dynamic", "static"))
def test_a_mask_wider_than_what_is_filled(model, kind):
    mask = torch.zeros(2, 20, dtype=torch.long)
    mask[:, :12], mask[1, :3] = 1, 0
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    )
    ours = MemoryState.zeros(model, 2)
    for part in (slice(0, 5), slice(5, 12)):
        # SDPA wants a mask as wide as the keys: the dynamic cache's is given that, the static one's may be wider
        width = part.stop if kind == "dynamic" else 20
        run(model, IDS[:, part], attention_mask=mask[:, :width], memory=ours, past_key_values=cache)
    assert close(ours, remembered(model, attention_mask=mask[:, :12]))


def generate(model, ids=IDS, *args, **kwargs):
    return model.generate(ids, *args, **({"do_sample": False} | kwargs))


def test_stopping_is_transformers_own(model):
    def both(**kwargs):
        with memory_disabled(model):
            bare = generate(zero, **kwargs)
        return bare, generate(zero, **kwargs)

    zero = model
    with torch.no_grad():
        kept = {n: p.clone() for n, p in model.named_parameters() if "delta_q" in n or "delta_o" in n}
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.zero_()
    try:
        token = generate(model, max_new_tokens=6, eos_token_id=None)[0, 14].item()
        for arguments in (
            {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0,
             "stopping_criteria": [EosTokenCriteria(eos_token_id=token)]},
            {"max_new_tokens": 4, "stopping_criteria": [MaxLengthCriteria(20)]},
            {"max_new_tokens": 6, "eos_token_id": token, "pad_token_id": 0},
        ):  # fmt: skip
            bare, ours = both(**arguments)
            assert torch.equal(bare, ours), arguments
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])


def test_an_eos_that_the_call_switches_off_ends_no_row(model):
    free = generate(model, max_new_tokens=8, eos_token_id=None)
    config = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = free[0, 14].item()
    try:
        memory = MemoryState.zeros(model, 2)
        ids = generate(model, max_new_tokens=8, eos_token_id=None, memory=memory)
    finally:
        model.generation_config.eos_token_id = config
    expected = remembered(model, ids[:, :-1])
    assert close(memory, expected)


def test_generate_takes_its_arguments_by_place(model):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = generate(model, max_new_tokens=3)
    assert torch.equal(model.generate(IDS, config, LogitsProcessorList()), expected)
    with pytest.raises(ValueError, match="num_beams: got 2 with memory="):
        config = GenerationConfig(max_new_tokens=3, num_beams=2)
        model.generate(IDS, config, memory=MemoryState.zeros(model, 2))
    with pytest.raises(ValueError, match="token_mask: generate takes attention_mask"):
        generate(model, token_mask=torch.ones(2, 12), max_new_tokens=2)


def test_segment_ids_of_a_wrong_kind():
    model = patch_model(tiny_model(), DeltaMemConfig.ssw())
    with pytest.raises(TypeError, match="segment_ids: got list"):
        generate(model, segment_ids=[[0] * 12] * 2, max_new_tokens=2)


def test_weights_changed_behind_autograds_back_count():
    model = loud_adapter(patch_model(tiny_model()))
    before = run(model)
    model.model.layers[0].self_attn.delta_memory.memory_v_proj.data.mul_(3)
    assert not torch.equal(run(model), before)


def test_a_memory_written_under_checkpointing_can_be_differentiated_through():
    found = []
    for reentrant in (True, False):
        model = loud_adapter(patch_model(tiny_model(attention="eager"))).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        memory = MemoryState.zeros(model, 2)
        model(IDS, memory=memory, use_cache=False)
        memory.frozen = True
        model(IDS, memory=memory, use_cache=False).logits.sum().backward()
        found.append(model.model.layers[0].self_attn.delta_memory.memory_v_proj.grad)
        model(IDS, memory=memory.detach(), use_cache=False)
        run(model, memory=memory)
    assert found[0].norm() > 0 and relative_error(*found) < 1e-4


@pytest.mark.parametrize("backend", ("numba", "reference"))
def test_a_step_without_a_graph_leaves_the_graph_alone(backend):
    model = loud_adapter(patch_model(tiny_model(), backend=backend))
    grads = []
    for disturb in (False, True):
        memory = MemoryState.zeros(model, 2)
        model(IDS, memory=memory, use_cache=False)
        kept = memory.clone()
        loss = sum((state**3).sum() for _, state in memory.items())
        if disturb:
            run(model, IDS[:, :1], memory=memory)
            assert not memory[0].requires_grad
        grads.append(torch.autograd.grad(loss, model.model.layers[0].self_attn.delta_memory.memory_k_proj)[0])
        del kept
    assert torch.equal(*grads)


def test_a_memory_belongs_to_its_adapter(model, tmp_path):
    other = loud_adapter(patch_model(tiny_model()), seed=9)
    memory = remembered(model)
    with pytest.raises(ValueError, match="memory: made under adapter .*, but the model's adapter is"):
        run(other, memory=memory)
    cache = DynamicCache(config=model.config)
    run(model, past_key_values=cache)
    with pytest.raises(ValueError, match="memory: made under adapter"):
        run(other, past_key_values=cache)
    same = loud_adapter(patch_model(tiny_model()))
    run(same, memory=memory.clone())
    run(same, past_key_values=cache)
    with pytest.raises(ValueError, match="memory: made under adapter"):
        MemoryState.cat([memory, remembered(other)])


def test_loading_an_adapter_does_not_take_old_memories_along(tmp_path):
    model = loud_adapter(patch_model(tiny_model()))
    old = remembered(model)
    save_adapter(loud_adapter(patch_model(tiny_model()), seed=9), tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="memory: made under adapter a fresh adapter"):
        run(model, memory=old)
    path = old.save(tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="saved under adapter a fresh adapter"):
        MemoryState.load(path, model)
    run(model, memory=MemoryState.zeros(model, 2))
    back = loud_adapter(patch_model(tiny_model()))
    assert close(MemoryState.load(path, back), old)


def test_a_cache_that_went_on_without_its_memory_is_refused(model):
    cache = DynamicCache(config=model.config)
    run(model, past_key_values=cache)
    with memory_disabled(model):
        run(model, IDS[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="got tokens while the memory was disabled"):
        run(model, IDS[:, :3], past_key_values=cache)
    cache = DynamicCache(config=model.config)
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="got a cache with packed sequences"):
        run(model, IDS[:1], past_key_values=cache, cu_seq_lens_q=starts)
    training = loud_adapter(patch_model(tiny_model())).train()
    training.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="which transformers drops under gradient checkpointing"):
        training(IDS, past_key_values=cache)


def test_a_reset_cache_can_start_anew_with_a_callers_memory(model):
    cache = StaticCache(config=model.config, max_cache_len=16)
    run(model, past_key_values=cache)
    cache.reset()
    memory = MemoryState.zeros(model, 2)
    run(model, past_key_values=cache, memory=memory)
    assert close(memory, remembered(model))


def test_a_forward_set_on_an_attention_is_not_passed_over():
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    with pytest.raises(ValueError, match="has a forward of its own set on the instance"):
        patch_model(model)


def test_what_was_put_in_place_since_stays(model):
    other = patch_model(tiny_model())
    mine = other.forward
    other.forward = lambda *args, **kwargs: mine(*args, **kwargs)
    with pytest.raises(ValueError, match="forward was replaced after patch_model"):
        unpatch_model(other)
    other.forward = mine
    unpatch_model(other)


def test_an_override_from_before_the_patch_is_called():
    model = tiny_model()
    calls = []
    original = model.generate
    model.generate = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    patch_model(model)
    generate(model, max_new_tokens=2)
    assert calls == [1]


@pytest.mark.parametrize("backend", ("numba", "reference"))
@pytest.mark.parametrize("frozen", (False, True))
def test_autocast_leaves_the_recurrence_in_float32(backend, frozen):
    from deltamem_kernels.numba import ops as numba_backend
    from deltamem_kernels.reference import recurrence as reference

    ops = {"numba": numba_backend, "reference": reference}[backend]
    rule = DeltaMemConfig().rule
    x, bias, state = torch.randn(2, 9, rule.width), torch.randn(8), torch.randn(2, 1, 8, 8)
    base, weight = torch.randn(2, 9, 5), torch.randn(5, 8)

    def all_of():
        reads = ops.read(x, state, rule) if frozen else ops.scan(x, bias, state, rule).reads
        return reads, ops.steer(base, reads, weight, 2.0)

    expected = all_of()
    with torch.autocast("cpu", torch.bfloat16):
        ours = all_of()
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(ours, expected))


def test_slots_outside_the_pool_are_refused():
    from deltamem_kernels.numba import ops as numba_backend

    rule = DeltaMemConfig().rule
    x, bias, pool = torch.randn(2, rule.width), torch.randn(8), torch.zeros(3, 1, 8, 8)
    slots = torch.tensor([0, 3])
    with pytest.raises(IndexError, match="slots: got 3, allowed −1 to 1"):
        numba_backend.step(x, bias, pool[:2], rule, slots=slots)
    with pytest.raises(IndexError, match="slots: got 3"):
        numba_backend.read(x[:, None], pool[:2], rule, slots=slots)
    assert pool.abs().max() == 0


def test_pickling(model, tmp_path):
    for part in (model, model.model.layers, model.model.layers[0].self_attn):
        with pytest.raises(TypeError, match="a patched model, or a part of it, cannot be pickled; use save_pretrained"):
            torch.save(part, io.BytesIO())
    memory = remembered(model)
    data = pickle.dumps(memory)
    assert len(data) < 20_000
    copy = pickle.loads(data)
    assert close(copy, memory, 1e-12)
    run(model, memory=copy)
    copy.save(tmp_path / "memory.safetensors")
    assert close(MemoryState.load(tmp_path / "memory.safetensors", model), copy, 1e-12)


def test_inference_mode_then_no_grad():
    model = loud_adapter(patch_model(tiny_model()))
    with torch.inference_mode():
        memory = MemoryState.zeros(model, 2)
        model(IDS, memory=memory)
        cache = model(IDS).past_key_values
    for ids in (IDS[:, :1], IDS):
        run(model, ids, memory=memory)
    run(model, IDS[:, :1], memory=memory)
    assert close(memory_state(cache), remembered(model))
    memory.zero_()
    assert memory[0].abs().max() == 0 and memory.skipped.sum() == 0


def test_inference_mode_then_gradients():
    model = loud_adapter(patch_model(tiny_model()))
    with torch.inference_mode():
        memory = MemoryState.zeros(model, 2)
        model(IDS, memory=memory, use_cache=False)
        cache = model(IDS).past_key_values
        copied = memory.clone()
    plain, found = remembered(model, use_cache=False), []
    for given in (plain, memory, copied):
        model.zero_grad()
        model(IDS, memory=given, use_cache=False).logits.sum().backward()
        found.append(model.model.layers[1].self_attn.delta_memory.memory_k_proj.grad.clone())
    assert all(relative_error(gradient, found[0]) < 1e-5 for gradient in found)
    model(IDS, past_key_values=cache).logits.sum().backward()


def test_mistaken_memories(model):
    wide = MemoryState({i: state.double() for i, state in MemoryState.zeros(model, 2).items()})
    with pytest.raises(TypeError, match="memory: layer 0 is torch.float64, allowed float32"):
        run(model, memory=wide)
    away = MemoryState({i: state.to("meta") for i, state in MemoryState.zeros(model, 2).items()})
    with pytest.raises(ValueError, match="memory: layer 0 is on meta, the model's is on cpu"):
        run(model, memory=away)
    with pytest.raises(IndexError, match=r"rows: got \[0.9\], allowed integers"):
        MemoryState.zeros(model, 2).select([0.9])
    frozen = MemoryState.zeros(model, 2)
    frozen.frozen = True
    with pytest.raises(ValueError, match="does not fit"):
        MemoryState.cat([MemoryState.zeros(model, 2), frozen])


def test_arguments_given_twice(model):
    with pytest.raises(TypeError, match="got input_ids twice"):
        model.model(IDS, input_ids=IDS)
    with pytest.raises(TypeError, match="positional arguments"):
        model.model(IDS, None, None, None, None, None, None, None, None, None)
