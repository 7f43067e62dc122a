"""SSW where nobody passes segment ids: a prompt is one segment, an answer is not written token by token."""

import copy
import logging

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model
from tokenizers_for_tests import chatml_tokenizer
from transformers import DynamicCache, StaticCache, pipeline

from deltamem_fast import DeltaMemConfig, MemoryState, memory_state, notices, patch_model, record_gates

IDS = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(5))
STEPS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=("numba", "reference", "generic"))
def model(request):
    backend = "reference" if request.param == "generic" else request.param
    model = loud_adapter(patch_model(tiny_model(), DeltaMemConfig.ssw(), backend=backend))
    if request.param == "generic":
        for layer in model.model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda *arguments: None)
    return model


@pytest.fixture
def told(caplog):
    """What was warned of, each cause afresh."""
    notices._told.clear()
    caplog.set_level(logging.WARNING, "deltamem_fast")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "deltamem_fast"]


def close(ours, theirs, tolerance=1e-5):
    return all(relative_error(ours[i], theirs[i]) <= tolerance for i in theirs)


def one_segment(model, ids=IDS, mask=None):
    """The memory after a prompt that is one segment."""
    memory = MemoryState.zeros(model, len(ids))
    with torch.no_grad():
        model(ids, attention_mask=mask, memory=memory, segment_ids=torch.zeros_like(ids), use_cache=False)
    return memory


def test_a_prompt_is_one_segment_and_the_answer_is_read(model):
    wanted = one_segment(model)
    memory = MemoryState.zeros(model, 2)
    address = memory[0].data_ptr()
    expected = model.generate(IDS, memory=memory, **STEPS)
    assert close(memory, wanted) and memory[0].data_ptr() == address
    # what is generated reads that segment
    cache, ids = DynamicCache(config=model.config), IDS
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, segment_ids=torch.zeros_like(ids)).logits
        for _ in range(6):
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            logits = model(ids[:, -1:], past_key_values=cache, segment_ids=-1).logits
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("segments", (None, -1), ids=("one segment", "not written"))
@pytest.mark.parametrize(
    "options",
    ({}, {"cache": StaticCache}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"embeds": True}),
    ids=str,
)
def test_caches_beams_and_samples(model, options, segments):
    given = STEPS | {k: v for k, v in options.items() if k not in ("cache", "embeds")}
    if "cache" in options:
        given["past_key_values"] = StaticCache(config=model.config, max_cache_len=32)
    prompt = {"inputs_embeds": model.model.embed_tokens(IDS).detach()} if "embeds" in options else {"input_ids": IDS}
    found = model.generate(**prompt, **given, segment_ids=segments, return_dict_in_generate=True)
    times = max(given.get("num_beams", 1), given.get("num_return_sequences", 1))
    wanted = MemoryState.zeros(model, 2) if segments == -1 else one_segment(model)
    assert close(memory_state(found.past_key_values), wanted.repeat(times))


def test_the_branch_of_a_guidance_is_written_as_a_prompt(model, told):
    other = IDS[1:, :7]
    found = model.generate(IDS[:1], guidance_scale=3.0, negative_prompt_ids=other, eos_token_id=None, **STEPS)
    with torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        ids, fed, segments = IDS[:1], (IDS[:1], other), 0
        for _ in range(6):
            with_it, without = (
                model(part, past_key_values=cache, segment_ids=torch.full_like(part, segments))
                .logits[:, -1]
                .log_softmax(-1)
                for part, cache in zip(fed, caches)
            )
            token = (without + 3.0 * (with_it - without)).argmax(-1, keepdim=True)
            ids, fed, segments = torch.cat([ids, token], 1), (token, token), -1
    assert torch.equal(found, ids)
    assert not any("each token was written by itself" in message for message in told())
    with torch.no_grad():  # what is called outside stays as it was
        model(IDS, use_cache=False)
    assert any("each token was written by itself" in message for message in told())


def test_padding_is_in_no_segment_and_a_second_prompt_is_another(model):
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    memory = MemoryState.zeros(model, 2)
    cache = DynamicCache(config=model.config)
    found = model.generate(IDS, attention_mask=mask, memory=memory, past_key_values=cache, **STEPS)
    assert close(memory, one_segment(model, mask=mask))
    assert close(memory.select([0]), one_segment(model, IDS[:1, 5:]))
    # the tokens that are in the cache already are no part of the next prompt's segment
    ids = torch.cat([found, IDS], 1)
    mask = torch.cat([mask, torch.ones(2, ids.shape[1] - 14, dtype=torch.long)], 1)
    fed, expected, same = ids[:, cache.get_seq_length() :], memory.clone(), copy.deepcopy(cache)
    assert fed.shape[1] == 15  # the last token of the answer was not fed
    model.generate(ids, attention_mask=mask, memory=memory, past_key_values=cache, **STEPS)
    with torch.no_grad():
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -15:]}
        model(fed, memory=expected, past_key_values=same, segment_ids=torch.zeros_like(fed), **given)
    assert close(memory, expected)


def test_a_loop_of_plain_forwards_writes_each_token_and_says_so_once(model, told):
    memory, cache = MemoryState.zeros(model, 2), DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :-2], memory=memory, past_key_values=cache, segment_ids=torch.zeros_like(IDS[:, :-2]))
        before = memory.clone()
        assert told() == []
        for t in (-2, -1):
            model(IDS[:, t:][:, :1], memory=memory, past_key_values=cache)
    assert not close(memory, before)
    (text,) = told()
    assert "segment_ids: got none" in text and "segment_ids=-1" in text and "message_mean" in text


def test_minus_one_reads_and_writes_nothing(model, told):
    memory = one_segment(model)
    kept = memory.clone()
    with torch.no_grad(), record_gates() as gates:
        found = model(IDS, memory=memory, segment_ids=-1).logits
        kept.frozen = True
        assert torch.equal(found, model(IDS, memory=kept).logits)
    assert close(memory, kept, 0) and gates.statistics() == {} and told() == []


def test_what_is_not_written_is_said_once(model, told):
    for _ in range(2):
        model.generate(IDS, **STEPS)
    prompt, answer = told()
    assert "got no segment_ids" in prompt and "one segment" in prompt
    assert "ingest" in answer and "MemorySession" in answer
    notices._told.clear()
    model.generate(IDS, memory=MemoryState.zeros(model, 2).read_only(), **STEPS)
    for _ in range(2):
        model.generate(IDS, use_cache=False, **STEPS)
    (without,) = told()[2:]
    assert "use_cache: got False" in without and "remembers nothing" in without


def test_other_strategies_are_not_warned_of(told):
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1)))
    memory = MemoryState.zeros(model, 2)
    found = model.generate(IDS, memory=memory, **STEPS)
    wanted = MemoryState.zeros(model, 2)
    with torch.no_grad():
        model(found[:, :-1], memory=wanted)
    assert close(memory, wanted) and told() == []
    with pytest.raises(ValueError, match="segment_ids: the adapter writes every token"):
        model.generate(IDS, segment_ids=torch.zeros_like(IDS), **STEPS)


def test_wrong_segments(model):
    for wrong in (0, -2, True, [0]):
        with pytest.raises(TypeError, match="segment_ids: "):
            model.generate(IDS, segment_ids=wrong, **STEPS)
        with pytest.raises(TypeError, match="segment_ids: got .*, allowed an integer tensor"):
            model(IDS, segment_ids=wrong)


def test_a_pipeline():
    tokenizer = chatml_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    loud_adapter(patch_model(model, DeltaMemConfig.ssw("sentence_mean")))
    memory = MemoryState.zeros(model)
    text = "She went home. My dog is called Rex."
    pipeline("text-generation", model, tokenizer=tokenizer)(text, memory=memory, max_new_tokens=4)
    assert close(memory, one_segment(model, tokenizer(text, return_tensors="pt")["input_ids"]))
