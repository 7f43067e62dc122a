"""Families of models: each works as unpatched with a zero output, or patch_model says why it cannot."""

import copy
import inspect

import pytest
import torch
from backbones import BACKBONES, BY_NAME, SHARED, WINDOWS, gemma3_with_images, tiny
from support import loud_adapter, relative_error
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltamem_fast import (
    DeltaMemConfig,
    MemoryState,
    is_patched,
    layer_paths,
    memory_state,
    patch_model,
    unpatch_model,
)
from deltamem_fast.adapter.wrappers import decoder_of
from deltamem_fast.errors import DeltaMemError, UnsupportedError
from deltamem_fast.model.begin import PromptsMask
from deltamem_fast.model.families import SHAPES
from deltamem_fast.model.projections import OTHERS

WORK = [backbone.name for backbone in BACKBONES if backbone.path != "refused"]
FAST = [backbone.name for backbone in BACKBONES if backbone.path == "fast"]
REFUSED = [backbone.name for backbone in BACKBONES if backbone.path == "refused"]
ALL_HEADS = DeltaMemConfig(delta_heads=("q", "k", "v", "o"))
IDS = torch.arange(5, 17)[None]


@torch.no_grad()
def outputs(model, **given):
    logits = model(input_ids=IDS, **given).logits
    return logits, model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def in_two_parts(model):
    first = model(input_ids=IDS[:, :7], use_cache=True)
    return model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values).logits


@pytest.mark.parametrize("family", WORK)
def test_a_family_works(family):
    model = BY_NAME[family].make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    bare, told = outputs(model)
    parts = relative_error(in_two_parts(model)[:, -1], bare[:, -1]) < 1e-5
    # LFM2 of transformers 5.10 forgets its convolutions' state where a second part has several tokens.
    assert parts or family.startswith("LFM2")
    patch_model(model, DeltaMemConfig(output_init="zero"))
    memory = MemoryState.zeros(model)
    for given in ({}, {"memory": memory}):
        logits, tokens = outputs(model, **given)
        assert relative_error(logits, bare) < 1e-5 and torch.equal(tokens, told)
    assert all(memory[i].norm() > 0 for i in memory)
    assert {place.path for place in layer_paths(model).values()} == {BY_NAME[family].path}, layer_paths(model)
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
    for out in (second, padded) if parts else (padded,):
        assert relative_error(out.logits[:, -1], whole.logits[:, -1]) < 1e-4
        assert all(relative_error(state, written[i]) < 1e-4 for i, state in memory_state(out.past_key_values).items())
    # Under autograd it says the same, and all that is trained gets a gradient.
    learning = model(input_ids=IDS, use_cache=False).logits
    learning.square().mean().backward()
    assert relative_error(learning, whole.logits) < 1e-5
    gradients = {n: p.grad for n, p in model.named_parameters() if ".delta_memory." in n and p.requires_grad}
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients.values()), gradients.keys()
    model.zero_grad()
    unpatch_model(model)
    assert torch.equal(outputs(model)[0], bare)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)


@pytest.fixture
def told(monkeypatch):
    """The plain arguments that each call of an attention function got, by name."""
    get, found = ALL_ATTENTION_FUNCTIONS.get_interface, []

    def get_interface(*args, **kwargs):
        function = get(*args, **kwargs)

        def attention(*args, **kwargs):
            found.append({name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)})
            return function(*args, **kwargs)

        return attention

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
    return found


@pytest.mark.parametrize("family", FAST)
def test_the_fused_forward_is_the_classs_own(family, told):
    """Against the generic path, which runs the class's own forward: a padded prompt, then a token at a time.

    What it tells the attention is the same, too: of a window, the mask says the same unless the kernel makes its own.
    """
    fast = loud_adapter(patch_model(BY_NAME[family].make(), ALL_HEADS))
    generic = copy.deepcopy(fast)
    for attention in generic._delta_memory_patch.attentions.values():
        attention.delta_memory.weights.reason = "this test wants the generic path"
    ids = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = []
    for model in (fast, generic):
        with torch.no_grad():
            out = model(input_ids=ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
            logits = [out.logits * mask[:, :12, None]]
            for t in range(12, 16):
                given = {"attention_mask": mask[:, : t + 1], "past_key_values": out.past_key_values}
                out = model(input_ids=ids[:, t : t + 1], **given)
                logits.append(out.logits)
        assert {place.path for place in layer_paths(model).values()} == {"fast" if model is fast else "generic"}
        found.append((torch.cat(logits, 1), memory_state(out.past_key_values)))
    assert told and told[: len(told) // 2] == told[len(told) // 2 :]
    (ours, state), (theirs, expected) = found
    assert relative_error(ours, theirs) < 1e-5
    assert all(relative_error(state[i], expected[i]) < 1e-5 and expected[i].norm() > 0 for i in expected)


def test_every_attention_that_is_known_by_name_is_among_these():
    """What families.SHAPES and projections.OTHERS say of a class is proven above, or not said."""
    families = {name.split(".")[2] for name in (*SHAPES, *OTHERS)}
    tested = {inspect.getmodule(type(BY_NAME[name].make().get_decoder())).__name__.split(".")[2] for name in WORK}
    assert families <= tested


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_with_the_reason(family):
    model, reason = BY_NAME[family].make(), BY_NAME[family].reason
    bare, told = outputs(model)
    with pytest.raises(UnsupportedError, match=f"model: .*{reason}.*not supported") as caught:
        patch_model(model, DeltaMemConfig(output_init="zero"))
    assert isinstance(caught.value, DeltaMemError) and not is_patched(model)
    logits, tokens = outputs(model)
    assert torch.equal(logits, bare) and torch.equal(tokens, told)


def test_layers_without_keys_of_their_own_are_left_out_by_target_layers():
    model = tiny("Gemma3nForCausalLM", **WINDOWS, **SHARED, activation_sparsity_pattern=[0.0] * 4)
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

    def forward(input_ids=None, attention_mask=None, past_key_values=None, labels=None, cache=None, **kwargs):
        past_key_values = cache if past_key_values is None else past_key_values  # its name since transformers 5.24
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
        out.image_hidden_states = out.image_outputs = None  # before and since transformers 5.24
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


def test_the_decoder_of_each_has_the_layers():
    """Sessions that are saved, and checkpointing, ask it for them."""
    for name in WORK:
        model = BY_NAME[name].make()
        decoder = decoder_of(model)
        assert decoder is not model and len(decoder.layers) == 4, name
