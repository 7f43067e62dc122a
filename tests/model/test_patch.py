"""patch_model and unpatch_model: what changes, what does not, and what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import GOLDEN, loud_adapter, relative_error, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, SmolLM3Config

from deltamem_fast import (
    DeltaMemConfig,
    MemoryState,
    is_patched,
    load_adapter,
    memory_disabled,
    patch_model,
    save_adapter,
    unpatch_model,
)

FAMILIES = ("qwen3", "smollm3", "llama", "mistral", "qwen2")
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(7))


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}, set(vars(model)), logits(model)


def assert_unchanged(model, before):
    weights, attributes, out = before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert set(vars(model)) == attributes
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_changes_and_unpatch_restores(family):
    model = tiny_model(family)
    before = snapshot(model)
    generated = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert loud_adapter(patch_model(model)) is model and is_patched(model)
    assert relative_error(logits(model), before[2]) > 1e-3
    with memory_disabled(model):
        assert torch.equal(logits(model), before[2])
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), generated)
    unpatch_model(model)
    assert not is_patched(model)
    assert_unchanged(model, before)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), generated)


def test_other_instances_and_classes_are_untouched():
    one, other = tiny_model(), tiny_model()
    forward, attributes = type(one).forward, set(vars(type(one)))
    expected = logits(other)
    loud_adapter(patch_model(one))
    assert type(one).forward is forward and set(vars(type(one))) == attributes
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("attention", ("eager", "sdpa", "flex_attention"))
def test_attention_implementations_agree(attention):
    expected = logits(loud_adapter(patch_model(tiny_model(attention="eager"))))
    assert relative_error(logits(loud_adapter(patch_model(tiny_model(attention=attention)))), expected) < 1e-5


def test_flash_attention_gives_its_own_error_where_it_is_missing():
    pytest.importorskip("transformers")
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    model = patch_model(tiny_model())
    with pytest.raises(ImportError, match="[Ff]lash"):
        model.set_attn_implementation("flash_attention_2")
        model(IDS)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (Qwen3Config, {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128}),
        (Qwen3Config, {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128}),
        (SmolLM3Config, {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}),
    ],
    ids=("Qwen3-4B", "Qwen3-8B", "SmolLM3-3B"),
)
def test_released_sizes_by_configuration(kind, sizes):
    config = kind(**sizes, num_key_value_heads=8 if kind is Qwen3Config else 4, vocab_size=1024, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        patch_model(model, DeltaMemConfig(output_init="random"))
    adapter = [p for name, p in model.named_parameters() if ".delta_memory." in name and p.requires_grad]
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    q_out = heads * sizes.get("head_dim", hidden // heads)
    assert sum(p.numel() for p in adapter) == 36 * (4 * 8 * hidden + 8 + 8 * (q_out + hidden))
    assert all(p.dtype == torch.bfloat16 for p in adapter)
    assert len(MemoryState.zeros(model, 2)) == 36


def test_parameter_count_of_qwen3_4b_is_the_published_one():
    assert round(36 * (4 * 8 * 2560 + 8 + 8 * (4096 + 2560)) / 1e6, 2) == 4.87


def test_refusals_leave_the_model_as_it_was():
    model = tiny_model()
    before = snapshot(model)
    refused = [
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda', allowed auto, triton, numba, reference"),
        ({"adapter": 3}, TypeError, "adapter: got int"),
        ({"adapter": "./nowhere"}, FileNotFoundError, "nowhere"),
        ({"adapter": DeltaMemConfig(target_layers=(7,))}, ValueError, r"layers \[7\], the model has 0 to 2"),
        ({"adapter": DeltaMemConfig(target_modules=("attn",))}, ValueError, "no attention named attn"),
    ]
    for arguments, kind, message in refused:
        with pytest.raises(kind, match=message):
            patch_model(model, **arguments)
        assert_unchanged(model, before)
    patch_model(model)
    with pytest.raises(ValueError, match="already patched with a fresh adapter"):
        patch_model(model, GOLDEN / "qwen3_tsw" / "adapter")
    with pytest.raises(ValueError, match="already patched"):
        patch_model(model.model)
    unpatch_model(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)


def test_a_model_without_attention_is_refused():
    from transformers import GPT2Config, GPT2Model

    with pytest.raises(ValueError, match="GPT2Model has no attention named self_attn with q_proj and o_proj"):
        patch_model(GPT2Model(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)))
    with pytest.raises(TypeError, match="model: got a Linear"):
        patch_model(torch.nn.Linear(2, 2))


def test_an_adapter_of_another_shape_is_refused_with_both_shapes():
    model = tiny_model(hidden_size=32)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"memory_q_proj of shape \[8, 64\], the model needs \[8, 32\]"):
        patch_model(model, GOLDEN / "qwen3_tsw" / "adapter")
    assert_unchanged(model, before)
    model = tiny_model(num_hidden_layers=2)
    with pytest.raises(ValueError, match="unexpected .*layers.2.self_attn"):
        patch_model(model, GOLDEN / "qwen3_tsw" / "adapter")
    model = tiny_model(num_hidden_layers=4)
    with pytest.raises(ValueError, match="lacks .*layers.3.self_attn"):
        patch_model(model, GOLDEN / "qwen3_tsw" / "adapter")


def test_a_failure_while_installing_is_undone(monkeypatch):
    model = tiny_model()
    before = snapshot(model)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("deltamem_fast.model.patch.generation_overrides", fail)
    with pytest.raises(KeyboardInterrupt):
        patch_model(model)
    assert_unchanged(model, before)
    assert not any("delta_memory" in name for name, _ in model.named_modules())


def test_two_copies_live_apart():
    model = loud_adapter(patch_model(tiny_model()))
    expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    with memory_disabled(model):
        assert torch.equal(logits(other), expected)
    loud_adapter(other, seed=5)
    bare = tiny_model().generate(IDS, max_new_tokens=3, do_sample=False)
    with memory_disabled(model):
        assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), bare)
        assert not torch.equal(other.generate(IDS, max_new_tokens=3, do_sample=False), bare)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)
    unpatch_model(other)
    assert is_patched(model) and torch.equal(logits(model), expected)


def test_dtype_and_double_precision_follow_to():
    model = loud_adapter(patch_model(tiny_model()))
    expected = logits(model)
    assert relative_error(logits(model.to(torch.float64), IDS), expected) < 1e-5
    memory = MemoryState.zeros(model, 2)
    logits(model, memory=memory)
    assert memory[0].dtype == torch.float32


def test_save_pretrained_writes_the_backbone_and_the_adapter_beside_it(tmp_path):
    model = loud_adapter(patch_model(tiny_model()))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits_without(model))
    assert torch.equal(logits(patch_model(loaded, tmp_path)), logits(model))
    unpatch_model(model)
    model.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "delta_mem_config.json").exists()


def logits_without(model):
    with memory_disabled(model):
        return logits(model)


def test_memory_disabled_is_local_to_its_thread():
    model = loud_adapter(patch_model(tiny_model()))
    expected = logits(model)
    with memory_disabled(model), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model).result(), expected)
        assert not torch.equal(logits(model), expected)


def test_threads_share_a_model():
    model = loud_adapter(patch_model(tiny_model()))
    prompts = [torch.randint(3, 128, (1, 4 + n)) for n in range(6)]

    def converse(prompt):
        memory = MemoryState.zeros(model, 1)
        return model.generate(prompt, max_new_tokens=5, do_sample=False, memory=memory), memory

    alone = [converse(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(converse, prompts))
    for (ids, memory), (other_ids, other_memory) in zip(alone, together):
        assert torch.equal(ids, other_ids)
        assert all(torch.equal(memory[i], other_memory[i]) for i in memory)


def test_lora_before_and_after():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=4, init_lora_weights=False)
    after = peft.get_peft_model(loud_adapter(patch_model(tiny_model())), config)
    before = peft.get_peft_model(tiny_model(), config)
    before.load_state_dict({k: v for k, v in after.state_dict().items() if ".delta_memory." not in k})
    loud_adapter(patch_model(before))
    assert relative_error(logits(before), logits(after)) < 1e-6
    with after.disable_adapter():
        assert relative_error(logits(after), logits(loud_adapter(patch_model(tiny_model())))) < 1e-6
    memory = MemoryState.zeros(after, 2)
    ids = after.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, memory=memory)
    assert ids.shape == (2, 23) and memory[0].norm() > 0
    unpatch_model(after)
    assert not is_patched(after)


class PackedLinear(torch.nn.Module):
    """A quantised linear as bitsandbytes makes them: packed bytes for a weight, the sizes as attributes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self._linear = [linear]

    def forward(self, x):
        return self._linear[0](x)


def test_quantised_linears():
    model = tiny_model(dtype=torch.bfloat16)
    expected = logits(loud_adapter(patch_model(tiny_model(dtype=torch.bfloat16))))
    for layer in model.model.layers:
        for head in "qkvo":
            name = f"{head}_proj"
            setattr(layer.self_attn, name, PackedLinear(getattr(layer.self_attn, name)))
    with pytest.raises(ValueError, match=r"output_init: got 'base_slice_fixed', but .*q_proj is quantised"):
        patch_model(model)
    loud_adapter(patch_model(model, DeltaMemConfig(output_init="random")))
    assert model.model.layers[0].self_attn.delta_memory.memory_q_proj.dtype == torch.bfloat16
    # two paths, which round differently
    assert relative_error(logits(model), expected) < 2e-2


@pytest.mark.parametrize("order", ("dispatch first", "patch first"))
def test_accelerate_hooks(order):
    accelerate = pytest.importorskip("accelerate")
    expected = loud_adapter(patch_model(tiny_model()))
    model = tiny_model()
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "cpu" for i in range(3)}

    def dispatch():
        accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)

    if order == "dispatch first":
        dispatch()
    loud_adapter(patch_model(model))
    if order == "patch first":
        dispatch()
    ours, theirs = MemoryState.zeros(model, 2), MemoryState.zeros(expected, 2)
    assert relative_error(logits(model, memory=ours), logits(expected, memory=theirs)) < 1e-6
    # hooked linears take the generic path, which rounds differently
    assert theirs[0].norm() > 0 and all(relative_error(ours[i], theirs[i]) < 1e-5 for i in theirs)


def test_start_of_the_parameters():
    model = patch_model(tiny_model(), DeltaMemConfig(beta_bias_init=-2.0, couple_lambda=False, online_gain=0.1))
    attention = model.model.layers[1].self_attn
    memory = attention.delta_memory
    assert torch.equal(memory.beta_bias, torch.full((8,), -2.0)) and torch.equal(
        memory.lambda_bias, torch.full((8,), 2.0)
    )
    assert memory.beta_proj.abs().max() == 0 and memory.lambda_proj.abs().max() == 0
    columns = attention.q_proj.weight[:, :8].detach()
    assert relative_error(memory.delta_q_proj, 0.1 * columns / columns.norm(dim=0)) < 1e-6
    assert memory.delta_k_proj.abs().max() == 0 and not memory.delta_k_proj.requires_grad
    assert 0 < memory.memory_q_proj.abs().max() <= (1 / 64) ** 0.5
    wide = patch_model(tiny_model(), DeltaMemConfig(rank=12)).model.layers[0].self_attn.delta_memory
    assert wide.delta_o_proj[:, 8:].abs().max() == 0 and wide.delta_o_proj[:, :8].abs().max() > 0
    whole = patch_model(tiny_model(), DeltaMemConfig(rank=12, output_init="base_slice")).model.layers[0].self_attn
    assert whole.delta_memory.delta_o_proj[:, 8:].abs().max() > 0
    none = patch_model(tiny_model(), DeltaMemConfig(output_init="zero"))
    assert relative_error(logits(none), logits(tiny_model())) < 1e-6


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing_writes_once(reentrant):
    results = []
    for checkpointing in (False, True):
        model = loud_adapter(patch_model(tiny_model(attention="eager"))).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        memory = MemoryState.zeros(model, 2)
        model(IDS, labels=IDS, memory=memory, use_cache=False).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if ".delta_memory." in n and p.grad is not None}
        results.append((memory.detach(), grads))
    (memory, grads), (other_memory, other_grads) = results
    assert grads and grads.keys() == other_grads.keys()
    assert all(relative_error(other_memory[i], memory[i]) < 1e-6 for i in memory)
    assert all(relative_error(other_grads[n], g) < 1e-5 for n, g in grads.items() if g.norm() > 1e-8)


def test_the_graph_runs_through_the_memory():
    model = loud_adapter(patch_model(tiny_model()))
    memory = MemoryState.zeros(model, 2)
    model(IDS, memory=memory, use_cache=False)
    memory.frozen = True
    weight = model.model.layers[0].self_attn.delta_memory.memory_v_proj
    loss = model(IDS[:, :5], memory=memory, use_cache=False).logits.square().sum()
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.norm() > 0
    with torch.no_grad():
        kept = memory[0].clone()
        memory.frozen = False
        model(IDS, memory=memory)
        assert not torch.equal(memory[0], kept) and not memory[0].requires_grad


def test_packed_sequences_get_a_memory_each():
    model = loud_adapter(patch_model(tiny_model()))
    starts = torch.tensor([0, 8, 20], dtype=torch.int32)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    arguments = {"position_ids": positions, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "use_cache": False}
    memory = MemoryState.zeros(model, 2)
    packed = logits(model, IDS[:1], memory=memory, max_length_q=12, max_length_k=12, **arguments)
    for row, (start, end) in enumerate(((0, 8), (8, 20))):
        alone = MemoryState.zeros(model, 1)
        assert relative_error(packed[:, start:end], logits(model, IDS[:1, start:end], memory=alone)) < 1e-5
        assert all(relative_error(memory[i][row : row + 1], alone[i]) < 1e-5 for i in alone)
    memory.frozen = True
    kept = memory.clone()
    read = logits(model, IDS[:1], memory=memory, max_length_q=12, max_length_k=12, **arguments)
    alone = kept.select([1])
    alone.frozen = True
    assert relative_error(read[:, 8:], logits(model, IDS[:1, 8:], memory=alone)) < 1e-5
    assert all(torch.equal(memory[i], kept[i]) for i in kept)


def test_output_attentions_and_hidden_states():
    model = loud_adapter(patch_model(tiny_model(attention="eager")))
    out = model(IDS, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 3 and len(out.hidden_states) == 4


def test_the_decoder_alone_can_be_patched(tmp_path):
    whole = loud_adapter(patch_model(tiny_model()))
    save_adapter(whole, tmp_path)
    decoder = patch_model(tiny_model().model, tmp_path)
    with torch.no_grad():
        hidden = decoder(IDS).last_hidden_state
        assert torch.equal(whole.lm_head(hidden), logits(whole))
    loud_adapter(decoder, seed=9)
    load_adapter(decoder, tmp_path)
    with torch.no_grad():
        assert torch.equal(decoder(IDS).last_hidden_state, hidden)


def test_the_backend_is_said_once(caplog, monkeypatch):
    from deltamem_kernels import dispatch as backends

    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(backends, "loaded", {})
    with caplog.at_level("INFO", logger="deltamem_fast"):
        patch_model(tiny_model())
        patch_model(tiny_model())
    assert [record.message for record in caplog.records if "backend=auto" in record.message] == [
        "backend=auto: numba for tensors on cpu"
    ]


def test_a_patch_works_with_a_plain_cache_made_without_a_configuration():
    model = loud_adapter(patch_model(tiny_model()))
    cache = DynamicCache()
    first = logits(model, IDS[:, :10], past_key_values=cache)
    second = logits(model, IDS[:, 10:], past_key_values=cache)
    assert relative_error(torch.cat([first, second], 1), logits(model)) < 1e-5
