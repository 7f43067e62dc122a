"""Attentions that compute q, k and v in one linear, or call their output otherwise: the same numbers as the usual ones.

Phi 3's attention with the rows of a Llama's q, k and v one behind another computes what that Llama computes, and so it
must with one and the same adapter.
"""

import dataclasses

import pytest
import torch
from backbones import CONVOLUTIONS, tiny
from support import loud_adapter, relative_error

from deltamem_fast import (
    DeltaMemConfig,
    MemoryState,
    layer_paths,
    load_adapter,
    patch_model,
    save_adapter,
    unpatch_model,
)
from deltamem_fast.model.projections import rows_of

IDS = torch.arange(5, 17)[None]
ALL_HEADS = DeltaMemConfig(
    delta_heads=("q", "k", "v", "o"), trainable_delta_scale=True, delta_scale_granularity="head", delta_o_rmsnorm=True
)


def twins():
    """A Phi 3 and a Llama with the same weights; neither has a window."""
    changes = {"sliding_window": None, "rms_norm_eps": 1e-6}
    phi, llama = tiny("Phi3ForCausalLM", **changes), tiny("LlamaForCausalLM", seed=1, **changes)
    state = phi.state_dict()
    for name in list(state):
        for fused, parts, sizes in (
            ("qkv_proj", ("q_proj", "k_proj", "v_proj"), (64, 32, 32)),
            ("gate_up_proj", ("gate_proj", "up_proj"), (96, 96)),
        ):
            if fused in name:
                rows = state.pop(name).split(sizes)
                state |= {name.replace(fused, part): each for part, each in zip(parts, rows)}
    llama.load_state_dict(state)
    return phi, llama


def logits(model, **given):
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


def test_twins_are_twins():
    phi, llama = twins()
    assert relative_error(logits(phi), logits(llama)) < 1e-6


@pytest.mark.parametrize("init", ("base_slice_fixed", "base_slice"))
def test_a_start_from_the_rows_of_each_head(init):
    phi, llama = (
        patch_model(model, DeltaMemConfig(delta_heads=("q", "k", "v", "o"), output_init=init)) for model in twins()
    )
    theirs = dict(llama.named_parameters())
    starts = {n: p for n, p in phi.named_parameters() if ".delta_memory.delta_" in n}
    assert len(starts) == 16 and all(p.norm() > 0 and torch.equal(p, theirs[n]) for n, p in starts.items())


@pytest.mark.parametrize("heads", ("q", "k", "v", "qo", "qkvo"))
@pytest.mark.parametrize("path", ("fast", "generic"))
def test_each_correction_lands_on_its_rows(path, heads, tmp_path):
    """One adapter, saved from one and loaded by the other."""
    phi, llama = twins()
    config = DeltaMemConfig(delta_heads=tuple(heads), trainable_delta_scale=True, delta_scale_granularity="head")
    save_adapter(loud_adapter(patch_model(llama, config)), tmp_path)
    patch_model(phi, tmp_path)
    if path == "generic":
        for layer in phi.model.layers:
            layer.self_attn.qkv_proj.register_forward_hook(lambda *arguments: None)
    assert {place.path for place in layer_paths(phi).values()} == {path}
    memories = [MemoryState.zeros(model) for model in (phi, llama)]
    ours, theirs = (logits(model, memory=memory) for model, memory in zip((phi, llama), memories))
    assert relative_error(ours, theirs) < 1e-5 and relative_error(ours, logits(unpatch_model(phi))) > 1e-3
    assert all(relative_error(memories[0][i], memories[1][i]) < 1e-5 for i in memories[1])


def test_gradients_are_the_same():
    gradients = []
    for model in twins():
        loud_adapter(patch_model(model, ALL_HEADS))
        model(input_ids=IDS).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".delta_memory." in n})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert all(p.norm() > 0 and relative_error(ours[n], p) < 1e-4 for n, p in theirs.items())


def test_bfloat16_as_far_from_float32_as_the_usual_ones():
    exact = logits(loud_adapter(patch_model(twins()[0], ALL_HEADS)))
    ours, theirs = (logits(loud_adapter(patch_model(model.bfloat16(), ALL_HEADS))) for model in twins())
    assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact) < 0.2


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("name", ("Phi3ForCausalLM", "Lfm2ForCausalLM", "PhiForCausalLM"))
def test_lora(name, when, tmp_path):
    """LoRA's linear in the place of the fused one, or of an output of another name."""
    peft = pytest.importorskip("peft")
    targets = {
        "Phi3ForCausalLM": ["qkv_proj", "o_proj"],
        "Lfm2ForCausalLM": r".*self_attn\.(q_proj|out_proj)",
        "PhiForCausalLM": ["q_proj", "dense"],
    }[name]
    changes = CONVOLUTIONS if name.startswith("Lfm2") else {}

    def lora(model):
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False))

    bare = tiny(name, **changes)
    merged = tiny(name, **changes)
    wrapped = lora(bare) if when == "before" else lora(loud_adapter(patch_model(bare)))
    if when == "before":
        loud_adapter(patch_model(wrapped))
    with_lora = lora(merged)
    with_lora.load_state_dict({k: v for k, v in wrapped.state_dict().items() if ".delta_memory." not in k})
    merged = loud_adapter(patch_model(with_lora.merge_and_unload().eval()))
    assert relative_error(logits(wrapped.eval()), logits(merged)) < 1e-5
    unpatch_model(wrapped)
    assert relative_error(logits(wrapped), logits(unpatch_model(merged))) < 1e-5


class Packed(torch.nn.Module):
    """A quantised linear: packed bytes for a weight, the sizes as attributes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), False)
        self._linear = [linear]

    def forward(self, x):
        return self._linear[0](x)


def test_quantised_linears():
    model, expected = twins()[0], logits(loud_adapter(patch_model(twins()[0], ALL_HEADS)))
    for layer in model.model.layers:
        layer.self_attn.qkv_proj = Packed(layer.self_attn.qkv_proj)
    with pytest.raises(ValueError, match="output_init: got 'base_slice_fixed', but .*qkv_proj is quantised"):
        patch_model(model)
    loud_adapter(patch_model(model, dataclasses.replace(ALL_HEADS, output_init="random")))
    assert relative_error(logits(model), expected) < 1e-5


@pytest.mark.parametrize("name", ("Phi3ForCausalLM", "Lfm2ForCausalLM"))
def test_saved_beside_the_backbone_and_loaded(name, tmp_path):
    changes = CONVOLUTIONS if name.startswith("Lfm2") else {}
    model = loud_adapter(patch_model(tiny(name, **changes), ALL_HEADS))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = patch_model(type(model).from_pretrained(tmp_path, dtype=torch.float32).eval(), tmp_path)
    assert torch.equal(logits(again), expected)
    loud_adapter(again, seed=5)
    assert relative_error(logits(again), expected) > 1e-3
    assert torch.equal(logits(load_adapter(again, tmp_path)), expected)


def test_rows_of_a_fused_linear():
    attention = tiny("Phi3ForCausalLM").model.layers[0].self_attn
    rows = rows_of(attention)
    assert [(p.name, p.first, p.size) for p in rows.values()] == [
        ("qkv_proj", 0, 64), ("qkv_proj", 64, 32), ("qkv_proj", 96, 32), ("o_proj", 0, 64),
    ]  # fmt: skip
    weights = [rows[head].weight for head in "qkv"]
    assert torch.equal(torch.cat(weights), attention.qkv_proj.weight)


def test_beams_of_a_model_whose_other_layers_keep_convolutions():
    model = loud_adapter(patch_model(tiny("Lfm2ForCausalLM", **CONVOLUTIONS)))
    ids = IDS.repeat(2, 1)
    ids[1] += 20
    given = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, **given)
    assert all(torch.equal(model.generate(row[None], **given)[0], out) for row, out in zip(ids, together))


def test_compiled_in_one_piece_under_autograd():
    """Where something is differentiated the generic path runs, which cuts the fused output."""
    model = loud_adapter(patch_model(tiny("Phi3ForCausalLM", num_hidden_layers=1), ALL_HEADS, backend="reference"))
    ids = IDS[:, :4]
    expected = model(input_ids=ids, memory=MemoryState.zeros(model), use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=ids, memory=MemoryState.zeros(model), use_cache=False).logits
    assert relative_error(found, expected) < 1e-5
    weight = model.model.layers[0].self_attn.delta_memory.delta_k_proj
    gradients = [torch.autograd.grad(out.square().mean(), weight)[0] for out in (expected, found)]
    assert gradients[0].norm() > 0 and relative_error(gradients[1], gradients[0]) < 1e-4
