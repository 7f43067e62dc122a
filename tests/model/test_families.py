"""Families of models: each works as unpatched with a zero output, or patch_model says why it cannot."""

import pytest
import torch
import transformers
from support import loud_adapter, relative_error

from deltamem_fast import DeltaMemConfig, MemoryState, is_patched, memory_state, patch_model, unpatch_model
from deltamem_fast.errors import DeltaMemError, UnsupportedError
from deltamem_fast.model.begin import PromptsMask

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
SHARED = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16}
TOKENS = {"image_token_index": 100, "boi_token_index": 105, "eoi_token_index": 106}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(5, 17)[None]


def tiny(name, **changes):
    """A random model of the class ``name``, if this transformers has it."""
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    return kind(kind.config_class(**(SMALL | changes))).eval()


def gemma3_with_images():
    if not hasattr(transformers, "Gemma3ForConditionalGeneration"):
        pytest.skip("this transformers has no Gemma3ForConditionalGeneration")
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=SMALL | GEMMA, vision_config=VISION, **TOKENS)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


WORK = {
    "Gemma 3 with images": gemma3_with_images,
    "Gemma 3": lambda: tiny("Gemma3ForCausalLM", **GEMMA),
    "gpt-oss": lambda: tiny("GptOssForCausalLM", **GEMMA, **EXPERTS),
    "OLMo 2": lambda: tiny("Olmo2ForCausalLM"),
    "Cohere": lambda: tiny("CohereForCausalLM"),
}
REFUSED = {
    "MiniMax": (lambda: tiny("MiniMaxForCausalLM", **EXPERTS), "a cache of its own, MiniMaxCache"),
    "Falcon-H1": (
        lambda: tiny("FalconH1ForCausalLM", **MAMBA),
        "(keeps layer 0 in a LinearAttentionAndFullAttentionLayer|hands no keyword arguments on to its layers)",
    ),
    "Gemma 3n": (
        lambda: tiny("Gemma3nForCausalLM", **GEMMA, **SHARED, activation_sparsity_pattern=[0.0] * 4),
        "(keeps layer 2 in a DummyLayer|keeps no keys and values of layer 2 in its cache)",
    ),
    "Nemotron": (
        lambda: tiny("NemotronForCausalLM"),
        "NemotronDecoderLayer hands no keyword arguments on to its self_attn",
    ),
    "StableLM": (lambda: tiny("StableLmForCausalLM"), "StableLmDecoderLayer hands no keyword arguments on"),
}


@torch.no_grad()
def outputs(model, **given):
    logits = model(input_ids=IDS, **given).logits
    return logits, model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("family", WORK)
def test_a_family_works(family):
    model = WORK[family]()
    bare, told = outputs(model)
    patch_model(model, DeltaMemConfig(output_init="zero"))
    memory = MemoryState.zeros(model)
    for given in ({}, {"memory": memory}):
        logits, tokens = outputs(model, **given)
        assert relative_error(logits, bare) < 1e-5 and torch.equal(tokens, told)
    assert all(memory[i].norm() > 0 for i in memory)
    loud_adapter(model)
    with torch.no_grad():
        # In two parts as in one; padding on the left is not written.
        whole = model(input_ids=IDS, use_cache=True)
        first = model(input_ids=IDS[:, :7], use_cache=True)
        second = model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), IDS], 1)
        padded = model(input_ids=padded, attention_mask=(padded != 0).long(), use_cache=True)
    assert relative_error(whole.logits, bare) > 1e-3
    written = memory_state(whole.past_key_values)
    for out in (second, padded):
        assert relative_error(out.logits[:, -1], whole.logits[:, -1]) < 1e-4
        assert all(relative_error(state, written[i]) < 1e-4 for i, state in memory_state(out.past_key_values).items())
    unpatch_model(model)
    assert torch.equal(outputs(model)[0], bare)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_with_the_reason(family):
    make, reason = REFUSED[family]
    model = make()
    bare, told = outputs(model)
    with pytest.raises(UnsupportedError, match=f"model: .*{reason}.*not supported") as caught:
        patch_model(model, DeltaMemConfig(output_init="zero"))
    assert isinstance(caught.value, DeltaMemError) and not is_patched(model)
    logits, tokens = outputs(model)
    assert torch.equal(logits, bare) and torch.equal(tokens, told)


def test_layers_without_keys_of_their_own_are_left_out_by_target_layers():
    model = tiny("Gemma3nForCausalLM", **GEMMA, **SHARED, activation_sparsity_pattern=[0.0] * 4)
    bare, told = outputs(model)
    patch_model(model, DeltaMemConfig(output_init="zero", target_layers=(0, 1)))
    memory = MemoryState.zeros(model)
    logits, tokens = outputs(model, memory=memory)
    assert relative_error(logits, bare) < 1e-5 and torch.equal(tokens, told)
    assert list(memory) == [0, 1] and memory[1].norm() > 0


def test_accelerates_hooks_move_what_a_prompts_mask_says():
    operations = pytest.importorskip("accelerate.utils.operations")
    for mask in (torch.ones(1, 3, dtype=torch.bool), True):
        moved = operations.send_to_device({"token_mask": PromptsMask(mask)}, "meta")["token_mask"]
        assert mask is True or moved.for_tokens(1, 3).is_meta
    assert moved.for_tokens(1, 3) is True


@pytest.mark.parametrize("prepared", [False, True], ids=["2-D mask", "prepared mask"])
def test_a_model_that_lengthens_its_prompt(prepared):
    """Image tokens that come in front of a prompt inside the model: its decoder's own mask tells which are real."""
    model = gemma3_with_images()
    inner, front = model.model, torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))

    def forward(input_ids=None, attention_mask=None, past_key_values=None, labels=None, **kwargs):
        hidden = inner.language_model.embed_tokens(input_ids)
        kwargs.pop("inputs_embeds"), kwargs.pop("position_ids"), kwargs.pop("pixel_values")
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            hidden = torch.cat([front, hidden], 1)
        if attention_mask is not None:
            attention_mask = torch.cat([torch.ones(2, 3, dtype=torch.int64), attention_mask], 1)
        if prepared and attention_mask is not None:
            attention_mask = dict.fromkeys(("full_attention", "sliding_attention"), attention_mask[:, None, None] != 0)
        kwargs = {name: value for name, value in kwargs.items() if name in ("memory", "token_mask", "use_cache")}
        out = inner.language_model(
            inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        out.image_hidden_states = None
        return out

    inner.forward = forward
    loud_adapter(patch_model(model, backend="reference"))
    ids = IDS.repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[0, :4] = mask[0, :4] = 0
    wanted, found, plain = (MemoryState.zeros(model, 2) for _ in range(3))
    hidden = torch.cat([front, inner.language_model.embed_tokens(ids)], 1).detach()
    real = torch.cat([torch.ones(2, 3, dtype=torch.int64), mask], 1)
    with torch.no_grad():
        model.get_decoder()(inputs_embeds=hidden, attention_mask=real, memory=wanted)
        model(input_ids=ids, memory=plain)  # without a mask all are real
        if prepared:
            with pytest.raises(DeltaMemError, match="attention_mask: got dict, allowed .*2, 15"):
                model(input_ids=ids, attention_mask=mask, memory=found)
            return
        first = model(input_ids=ids, attention_mask=mask, memory=found)
        assert all(relative_error(found[i], wanted[i]) < 1e-5 for i in wanted)
        assert all(relative_error(plain[i][1], wanted[i][1]) < 1e-5 for i in wanted)
        longer = torch.cat([mask, mask[:, -1:]], 1)
        model(input_ids=ids[:, :1], attention_mask=longer, memory=found, past_key_values=first.past_key_values)
        generated = MemoryState.zeros(model, 2)
        model.generate(input_ids=ids, attention_mask=mask, memory=generated, max_new_tokens=1, do_sample=False)
    assert all(relative_error(generated[i], wanted[i]) < 1e-5 for i in wanted)
