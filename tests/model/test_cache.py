"""The memory in caches and in generate: whatever moves the rows of a cache moves the memory."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from deltamem_fast import DeltaMemConfig, MemoryState, memory_disabled, memory_state, patch_model
from deltamem_fast.model.cache import ROOM, MemoryDynamicLayer
from deltamem_fast.model.signatures import cache_name

FAMILIES = ("qwen3", "smollm3", "mistral")
IDS = torch.randint(3, 128, (3, 26), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return loud_adapter(patch_model(tiny_model(request.param)))


@pytest.fixture(scope="module")
def qwen():
    return loud_adapter(patch_model(tiny_model()))


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model, length=40):
    return StaticCache(config=model.config, max_cache_len=length)


def close(ours, theirs, tolerance=1e-5):
    return len(ours) == len(theirs) and all(relative_error(ours[i], theirs[i]) < tolerance for i in theirs)


def equal(ours, theirs):
    return all(torch.equal(ours[i], theirs[i]) for i in theirs)


@pytest.mark.parametrize("make", (dynamic, static))
@pytest.mark.parametrize("chunks", ([26], [1] * 26, [25, 1], [1, 25], [7, 9, 10], [13, 13]))
def test_any_chunking_is_the_whole(model, make, chunks):
    expected = dynamic(model)
    whole = run(model, IDS, past_key_values=expected)
    cache = make(model)
    parts = [run(model, part, past_key_values=cache) for part in IDS.split(chunks, 1)]
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5
    assert close(memory_state(cache), memory_state(expected))


@pytest.mark.parametrize("config", (DeltaMemConfig.msw(heads=4), DeltaMemConfig(rank=3, rankwise_gates=False)))
def test_prefill_is_decode_for_other_shapes(config):
    model = loud_adapter(patch_model(tiny_model(), config))
    whole, steps = MemoryState.zeros(model, 3), MemoryState.zeros(model, 3)
    run(model, IDS, memory=whole)
    cache = dynamic(model)
    for t in range(26):
        run(model, IDS[:, t : t + 1], memory=steps, past_key_values=cache)
    assert close(steps, whole)


def test_bfloat16_model_with_float32_state():
    model = loud_adapter(patch_model(tiny_model(dtype=torch.bfloat16)))
    whole, steps = MemoryState.zeros(model, 3), MemoryState.zeros(model, 3)
    run(model, IDS, memory=whole)
    cache = dynamic(model)
    for t in range(26):
        run(model, IDS[:, t : t + 1], memory=steps, past_key_values=cache)
    assert whole[0].dtype == torch.float32 and close(steps, whole, 1e-2)


def test_two_conversations_do_not_meet(model):
    def turns(ids, cache):
        return [lambda part=part: run(model, part, past_key_values=cache) for part in ids.split([9, 1, 6, 1, 9], 1)]

    first, second = IDS[:2], IDS[2:]
    alone = [dynamic(model), dynamic(model)]
    for ids, cache in zip((first, second), alone):
        for turn in turns(ids, cache):
            turn()
    caches = [dynamic(model), dynamic(model)]
    for a, b in zip(turns(first, caches[0]), turns(second, caches[1])):
        a()
        b()
    for ours, theirs in zip(caches, alone):
        assert equal(memory_state(ours), memory_state(theirs))


def test_the_cache_that_the_model_makes_remembers(qwen):
    with torch.no_grad():
        out = qwen(IDS[:, :20])
        again = qwen(IDS[:, 20:], past_key_values=out.past_key_values).logits
        assert relative_error(again, qwen(IDS).logits[:, 20:]) < 1e-5
        assert qwen(IDS, use_cache=False).past_key_values is None


def test_no_cache_starts_from_zero(qwen):
    assert torch.equal(run(qwen, IDS, use_cache=False), run(qwen, IDS, use_cache=False))


def test_a_callers_memory_carries_across_contexts(qwen):
    memory = MemoryState.zeros(qwen, 3)
    run(qwen, IDS[:, :10], memory=memory)
    address = memory[0].data_ptr()
    expected = memory.clone()
    first = run(qwen, IDS[:, 10:], memory=memory)
    assert memory[0].data_ptr() == address and not equal(memory, expected)
    assert torch.equal(run(qwen, IDS[:, 10:], memory=expected), first)
    assert not torch.allclose(first, run(qwen, IDS[:, 10:]))


def test_frozen_memory_is_read_and_not_written(qwen):
    memory = MemoryState.zeros(qwen, 3)
    run(qwen, IDS[:, :10], memory=memory)
    memory.frozen = True
    kept = memory.clone()
    assert kept.frozen
    whole = run(qwen, IDS[:, 10:], memory=memory)
    cache = dynamic(qwen)
    steps = [run(qwen, IDS[:, t : t + 1], memory=memory, past_key_values=cache) for t in range(10, 26)]
    assert relative_error(torch.cat(steps, 1), whole) < 1e-5 and equal(memory, kept)


def test_a_caches_memory_can_be_frozen(qwen):
    cache = dynamic(qwen)
    run(qwen, IDS[:, :10], past_key_values=cache)
    memory_state(cache).frozen = True
    kept = memory_state(cache).clone()
    run(qwen, IDS[:, 10:], past_key_values=cache)
    assert equal(memory_state(cache), kept)


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_is_not_written(model, side):
    lengths = (26, 15, 4)
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(lengths):
        place = slice(26 - length, 26) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    memory = MemoryState.zeros(model, 3)
    out = run(model, ids, attention_mask=mask, memory=memory)
    for row, length in enumerate(lengths):
        alone = MemoryState.zeros(model, 1)
        expected = run(model, IDS[row : row + 1, :length], memory=alone)
        assert relative_error(out[row][mask[row].bool()], expected[0]) < 2e-5
        assert close(memory.select([row]), alone, 2e-5)


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("make", (dynamic, static))
def test_left_padding_through_chunks_and_decode(attention, make):
    model = loud_adapter(patch_model(tiny_model(attention=attention)))
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    cache, start = make(model), 0
    for width in (5, 7, 1, 1, 12):
        run(model, IDS[:, start : start + width], attention_mask=mask[:, : start + width], past_key_values=cache)
        start += width
    alone = MemoryState.zeros(model, 1)
    run(model, IDS[1:2, 9:], memory=alone)
    assert close(memory_state(cache).select([1]), alone)


def test_a_mask_as_wide_as_the_static_cache(qwen):
    cache, mask = static(qwen), torch.zeros(3, 40, dtype=torch.long)
    mask[:, 2:26] = 1
    run(qwen, IDS[:, :10], attention_mask=mask, past_key_values=cache)
    run(qwen, IDS[:, 10:], attention_mask=mask, past_key_values=cache)
    alone = MemoryState.zeros(qwen, 3)
    run(qwen, IDS[:, 2:], memory=alone)
    assert close(memory_state(cache), alone)


def test_a_prepared_mask_needs_the_token_mask(qwen):
    prepared = torch.ones(26, 26, dtype=torch.bool).tril().expand(3, 1, 26, 26)
    with pytest.raises(ValueError, match=r"attention_mask: got \[3, 1, 26, 26\].*token_mask"):
        qwen(IDS, attention_mask=prepared)
    expected, given, partly = (MemoryState.zeros(qwen, 3) for _ in range(3))
    run(qwen, IDS, memory=expected)
    run(qwen, IDS, attention_mask=prepared, token_mask=True, memory=given)
    assert close(given, expected)
    real = torch.ones(3, 26, dtype=torch.bool)
    real[:, 20:] = False
    run(qwen, IDS, attention_mask=prepared, token_mask=real, memory=partly)
    alone = MemoryState.zeros(qwen, 3)
    run(qwen, IDS[:, :20], memory=alone)
    assert close(partly, alone)


def test_reset(model):
    for make in (dynamic, static):
        cache = make(model)
        run(model, IDS, past_key_values=cache)
        memory = memory_state(cache)
        address = memory[0].data_ptr()
        cache.reset()
        assert all(state.abs().max() == 0 for _, state in memory.items())
        assert memory_state(cache) is memory and memory[0].data_ptr() == address


def test_a_static_cache_is_reused_after_reset(qwen):
    cache = static(qwen)
    expected = run(qwen, IDS, past_key_values=cache)
    cache.reset()
    assert relative_error(run(qwen, IDS, past_key_values=cache), expected) < 1e-6


def test_batch_operations_move_the_memory(qwen):
    cache = dynamic(qwen)
    run(qwen, IDS, past_key_values=cache)
    before = memory_state(cache).clone()
    cache.batch_repeat_interleave(2)
    assert equal(memory_state(cache), before.repeat(2))
    cache.batch_select_indices(torch.tensor([0, 3, 4]))
    assert equal(memory_state(cache), before.select([0, 1, 2]))
    address = memory_state(cache)[0].data_ptr()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert equal(memory_state(cache), before.select([2, 0, 0])) and memory_state(cache)[0].data_ptr() == address


def test_a_copied_cache_is_a_fork(qwen):
    cache = dynamic(qwen)
    run(qwen, IDS[:, :10], past_key_values=cache)
    fork = copy.deepcopy(cache)
    kept = memory_state(fork).clone()
    run(qwen, IDS[:, 10:], past_key_values=cache)
    assert equal(memory_state(fork), kept) and not equal(memory_state(cache), kept)
    run(qwen, IDS[:, 10:], past_key_values=fork)
    assert equal(memory_state(fork), memory_state(cache))


def generate(model, ids=IDS, **kwargs):
    return model.generate(ids, **({"max_new_tokens": 6, "do_sample": False} | kwargs))


@pytest.mark.parametrize(
    "arguments",
    (
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"prefill_chunk_size": 7},
    ),
    ids=lambda a: next(iter(a)),
)
def test_generate_agrees_with_itself(model, arguments):
    assert torch.equal(generate(model, **arguments), generate(model))


@pytest.mark.parametrize("arguments", ({}, {"cache_implementation": "static", "disable_compile": True}))
def test_beams_carry_their_memory(model, arguments):
    # without a cache every step recomputes every beam from its own tokens: nothing can go astray
    expected = generate(model, num_beams=4, use_cache=False)
    assert torch.equal(generate(model, num_beams=4, **arguments), expected)
    assert not torch.equal(expected, generate(model))


def test_return_sequences_are_apart(model):
    def sampled(**kwargs):
        torch.manual_seed(5)
        return generate(model, do_sample=True, num_return_sequences=3, **kwargs)

    assert torch.equal(sampled(), sampled(use_cache=False))


def test_generate_writes_all_but_the_last_token(qwen):
    memory = MemoryState.zeros(qwen, 3)
    ids = generate(qwen, memory=memory)
    alone = MemoryState.zeros(qwen, 3)
    run(qwen, ids[:, :-1], memory=alone)
    assert close(memory, alone)
    out = generate(qwen, return_dict_in_generate=True)
    assert close(memory_state(out.past_key_values), alone)


def test_generate_continues_a_cache(qwen):
    cache = dynamic(qwen)
    first = generate(qwen, IDS[:, :12], past_key_values=cache)
    more = torch.cat([first, IDS[:, 12:15]], 1)
    second = generate(qwen, more, past_key_values=cache)
    assert torch.equal(second, generate(qwen, more, use_cache=False))


@pytest.mark.parametrize("given", ("memory", "cache"))
def test_a_row_that_has_ended_writes_nothing_more(qwen, given):
    free = generate(qwen, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    ended = next(t for t in free[0, 29:35].tolist() if t not in free[1:, 26:].tolist())
    arguments = {"max_new_tokens": 12, "eos_token_id": ended, "pad_token_id": 0}

    def remembered(ids):
        if given == "memory":
            memory = MemoryState.zeros(qwen, ids.shape[0])
            generate(qwen, ids, memory=memory, **arguments)
            return memory
        return memory_state(generate(qwen, ids, return_dict_in_generate=True, **arguments).past_key_values)

    together, alone = remembered(IDS), remembered(IDS[:1])
    assert close(together.select([0]), alone)


def test_a_row_ended_by_the_callers_criterion_writes_nothing_more(qwen):
    class Stop:
        calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            return torch.tensor([n == 0 and input_ids.shape[1] >= 30 for n in range(input_ids.shape[0])])

    stop, memory, alone = Stop(), MemoryState.zeros(qwen, 3), MemoryState.zeros(qwen, 1)
    generate(qwen, memory=memory, stopping_criteria=[stop], max_new_tokens=9, eos_token_id=2, pad_token_id=0)
    generate(qwen, IDS[:1], memory=alone, stopping_criteria=[Stop()], max_new_tokens=9, eos_token_id=2, pad_token_id=0)
    assert stop.calls == 9 and close(memory.select([0]), alone)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_beams": 2, "memory": 3}, ValueError, "num_beams: got 2 with memory="),
        ({"num_return_sequences": 2, "do_sample": True, "memory": 3}, ValueError, "num_return_sequences: got 2"),
        ({"use_cache": False, "memory": 3}, ValueError, "use_cache: got False with memory="),
        ({"prompt_lookup_num_tokens": 3}, NotImplementedError, "prompt-lookup"),
        ({"cache_implementation": "paged"}, NotImplementedError, "continuous batching"),
        ({"memory": 2}, ValueError, r"memory: got 2 row\(s\) for a batch of 3"),
    ],
)
def test_what_cannot_be_right_raises(qwen, arguments, kind, message):
    if "memory" in arguments:
        arguments = arguments | {"memory": MemoryState.zeros(qwen, arguments["memory"])}
    with pytest.raises(kind, match=message):
        generate(qwen, **arguments)


def test_assisted_decoding_and_cropping_raise(qwen):
    with pytest.raises(NotImplementedError, match="assisted"):
        generate(qwen, IDS[:1], assistant_model=tiny_model())
    cache = dynamic(qwen)
    run(qwen, IDS, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(-1)


def test_a_refused_crop_cuts_no_layer():
    model = loud_adapter(patch_model(tiny_model(), DeltaMemConfig(target_layers=[1, 2])))
    for own in (True, False):
        cache = dynamic(model)
        run(model, IDS, past_key_values=cache, **({} if own else {"memory": MemoryState.zeros(model, 3)}))
        for copied in (cache, copy.deepcopy(cache)):
            with pytest.raises(NotImplementedError, match="crop"):
                copied.crop(-6)
            assert [layer.get_seq_length() for layer in copied.layers] == [26, 26, 26]


@pytest.mark.parametrize("ids", (IDS[:, :0], IDS[:0]), ids=("no token", "no row"))
def test_nothing_to_read(qwen, ids):
    with pytest.raises(ValueError, match=r"input_ids: got shape \[\d+, \d+\], allowed one row and one token, or more"):
        run(qwen, ids)


def test_mistaken_arguments_of_a_forward(qwen):
    memory = MemoryState.zeros(qwen, 3)
    for arguments, kind, message in (
        ({"memory": 5}, TypeError, "memory: got int, allowed a MemoryState"),
        ({"memory": MemoryState.zeros(qwen, 2)}, ValueError, r"memory: got 2 row\(s\) for a batch of 3"),
        ({"segment_ids": IDS}, ValueError, "segment_ids: the adapter writes every token"),
        ({"token_mask": torch.ones(3, 5)}, ValueError, r"token_mask: got \[3, 5\], allowed a tensor \[3, 26\]"),
        ({"attention_mask": torch.ones(3, 5)}, ValueError, r"attention_mask: got \[3, 5\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 26])}, ValueError, "cu_seq_lens_q: got with a batch of 3"),
        (
            {"past_key_values": ((IDS, IDS),), "attention_mask": torch.ones_like(IDS)},
            TypeError,
            "past_key_values: got tuple, allowed a decoder's Cache",
        ),
    ):
        with pytest.raises(kind, match=message):
            qwen(IDS, **({"memory": memory} | arguments))
    assert all(state.abs().max() == 0 for _, state in memory.items())
    other = patch_model(tiny_model(), DeltaMemConfig.msw())
    with pytest.raises(ValueError, match=r"memory: got layers .*\[4, 8, 8\].*the model's adapter has .*\[1, 8, 8\]"):
        qwen(IDS, memory=MemoryState.zeros(other, 3))


def test_a_cache_that_the_memory_has_not_read_is_refused(qwen):
    from deltamem_fast import memory_disabled

    cache = dynamic(qwen)
    with memory_disabled(qwen):
        run(qwen, IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="already holds tokens that the memory has not read"):
        run(qwen, IDS, past_key_values=cache)
    cache = dynamic(qwen)
    memory = MemoryState.zeros(qwen, 3)
    run(qwen, IDS, past_key_values=cache, memory=memory)
    with pytest.raises(ValueError, match="filled with a memory= of the caller's"):
        run(qwen, IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="holds no memory"):
        memory_state(cache)
    cache = dynamic(qwen)
    run(qwen, IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="already carries a memory of its own"):
        run(qwen, IDS, past_key_values=cache, memory=memory)
    run(qwen, IDS, past_key_values=cache, memory=memory_state(cache))
    with pytest.raises(ValueError, match=r"got a batch of 2, but the cache's memory has 3 row\(s\)"):
        run(qwen, IDS[:2], past_key_values=cache)


def test_layers_that_cannot_carry_a_memory_are_refused(qwen):
    class OtherLayer(type(DynamicCache(config=qwen.config).layers[0])):
        pass

    cache = dynamic(qwen)
    cache.layers[1] = OtherLayer()
    with pytest.raises(TypeError, match="layer 1 is a OtherLayer, allowed DynamicLayer"):
        run(qwen, IDS, past_key_values=cache)


def test_segments(tmp_path):
    model = loud_adapter(patch_model(tiny_model(), DeltaMemConfig.ssw()))
    ids = torch.full((3, 26), -1)
    ids[0, 4:12], ids[0, 12:20], ids[1, 3:26] = 5, 2, 0
    cache = dynamic(model)
    run(model, IDS, past_key_values=cache, segment_ids=ids)
    memory = memory_state(cache)
    assert memory[0][2].abs().max() == 0 and memory[0][:2].abs().amax((1, 2, 3)).min() > 0
    # rows are independent: each alone gives the same, also with ids renumbered in order
    for row, names in ((0, {5: 1, 2: 0}), (1, {0: 9})):
        alone, renamed = dynamic(model), ids[row : row + 1].clone()
        for old, new in names.items():
            renamed[ids[row : row + 1] == old] = new
        run(model, IDS[row : row + 1], past_key_values=alone, segment_ids=renamed)
        assert close(memory.select([row]), memory_state(alone))
    out = generate(model, segment_ids=ids, return_dict_in_generate=True)
    # what is generated has no segment yet: it is read, and not written
    assert close(memory, memory_state(out.past_key_values))
    assert torch.equal(generate(model, segment_ids=ids), out.sequences)
    assert generate(model, segment_ids=ids, num_beams=2).shape == out.sequences.shape
    with pytest.raises(ValueError, match="use_cache: got False with segment_ids="):
        generate(model, segment_ids=ids, use_cache=False)
    with pytest.raises(ValueError, match="prefill_chunk_size: got 4, allowed None with SSW"):
        generate(model, segment_ids=ids, prefill_chunk_size=4)
    with pytest.raises(ValueError, match=r"segment_ids: got shape \[3, 5\], allowed the prompt's, \[3, 26\]"):
        generate(model, segment_ids=ids[:, :5])
    with pytest.raises(ValueError, match=r"segment_ids: got shape \[3, 26\], allowed the prompt's, \[3, 5\]"):
        generate(model, inputs_embeds=torch.zeros(3, 5, 64), input_ids=None, segment_ids=ids)
    with pytest.raises(TypeError, match="segment_ids: got dtype torch.float32, allowed an integer tensor"):
        run(model, IDS, segment_ids=ids.float())
    # without ids every token is written, as in TSW
    plain, token = MemoryState.zeros(model, 3), loud_adapter(patch_model(tiny_model()))
    expected = MemoryState.zeros(token, 3)
    run(model, IDS, memory=plain)
    run(token, IDS, memory=expected)
    assert equal(plain, expected)


def test_masked_tokens_are_no_part_of_a_segment():
    model = loud_adapter(patch_model(tiny_model(), DeltaMemConfig.ssw()))
    mask = torch.ones_like(IDS)
    mask[:, :6] = 0
    ids = torch.zeros_like(IDS)
    padded, alone = MemoryState.zeros(model, 3), MemoryState.zeros(model, 3)
    run(model, IDS, attention_mask=mask, memory=padded, segment_ids=ids)
    run(model, IDS[:, 6:], memory=alone, segment_ids=ids[:, 6:])
    assert close(padded, alone)


@pytest.mark.parametrize("segmented", (False, True))
def test_a_token_that_is_not_finite_is_left_out_and_counted(segmented):
    config = DeltaMemConfig.ssw() if segmented else DeltaMemConfig()
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1), config))
    embeds = model.model.embed_tokens(IDS).detach()
    broken = embeds.clone()
    broken[1, 9] = float("nan")
    mask = torch.ones_like(IDS)
    mask[1, 9] = 0
    arguments = {"segment_ids": torch.zeros_like(IDS)} if segmented else {}
    memory, masked = MemoryState.zeros(model, 3), MemoryState.zeros(model, 3)
    with torch.no_grad():
        model(inputs_embeds=broken, memory=memory, **arguments)
        model(inputs_embeds=embeds, token_mask=mask, memory=masked, **arguments)
    assert close(memory, masked) and memory.skipped.tolist() == [0, 1, 0] and masked.skipped.sum() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", (DynamicCache, StaticCache))
def test_offloaded_caches(kind):
    model = loud_adapter(patch_model(tiny_model())).cuda()
    ids = IDS.cuda()
    size = {"max_cache_len": 40} if kind is StaticCache else {}
    cache = kind(config=model.config, offloading=True, **size)
    expected = dynamic(model)
    run(model, ids, past_key_values=expected)
    for part in ids.split([20, 1, 5], 1):
        run(model, part, past_key_values=cache)
    assert close(memory_state(cache), memory_state(expected))


# --- keys and values that grow in place


def tokens(count, batch=2):
    return torch.randn(batch, 3, count, 4), torch.randn(batch, 3, count, 4)


def grown(*counts):
    """A layer that grows in place, having got so many tokens at a time, and the plain one."""
    layers = MemoryDynamicLayer(), DynamicLayer()
    with torch.no_grad():
        for count in counts:
            new = tokens(count)
            ours, theirs = (layer.update(*new) for layer in layers)
            assert all(map(torch.equal, ours, theirs))
    return layers


def test_keys_and_values_grow_in_place():
    layer, _ = grown(5, 1, 1, 7, ROOM + 3, 1)
    with torch.no_grad():
        held, address = (layer.keys, layer.values), layer.keys.data_ptr()
        before = [tensor.clone() for tensor in held]
        for _ in range(ROOM - 1):
            layer.update(*tokens(1))
        assert layer.keys.data_ptr() == address and all(map(torch.equal, held, before))
        layer.update(*tokens(1))
        assert layer.keys.data_ptr() != address


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "fork", (copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_a_file)
)
def test_forks_of_a_layer_do_not_meet(fork):
    layer, _ = grown(5, 1)
    past = layer.keys.clone()
    forks = [layer, fork(layer), fork(layer)]
    with torch.no_grad():
        for _ in range(3):
            new = [tokens(1) for _ in forks]
            expected = [torch.cat([fork.keys, keys], 2) for fork, (keys, _) in zip(forks, new)]
            found = [fork.update(*more)[0] for fork, more in zip(forks, new)]
            assert all(map(torch.equal, found, expected))
    assert all(torch.equal(fork.keys[:, :, :6], past) for fork in forks)


def test_a_layer_set_back_overwrites_nothing():
    layer, _ = grown(5, 1)
    with torch.no_grad():
        mark = dict(vars(layer))
        layer.update(*tokens(1))
        ahead, kept = layer.keys, layer.keys.clone()
        vars(layer).update(mark)
        layer.update(*tokens(1))
        assert torch.equal(ahead, kept) and torch.equal(layer.keys[:, :, :6], kept[:, :, :6])
        layer.keys, layer.values = layer.keys[:, :, :4], layer.values[:, :, :4]
        last, kept = layer.keys, ahead.clone()
        layer.update(*tokens(1))
        assert torch.equal(ahead, kept) and torch.equal(layer.keys[:, :, :4], last)
        layer.keys = layer.keys + 1
        expected = torch.cat([layer.keys, layer.keys[:, :, :1]], 2)
        assert torch.equal(layer.update(layer.keys[:, :, :1], layer.values[:, :, :1])[0], expected)
        layer.batch_select_indices(torch.tensor([1]))
        layer.update(*tokens(1, batch=1))
        assert layer.keys.shape == (1, 3, 7, 4)


def test_growing_leaves_gradients_and_inference_tensors_alone():
    layer, _ = grown(5, 1)
    keys, values = tokens(1)
    keys.requires_grad_()
    layer.update(keys, values)[0].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))
    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    with torch.inference_mode():
        layer.update(*tokens(1))
        layer.update(*tokens(1))
    with torch.no_grad():
        assert layer.update(*tokens(1))[0].shape[2] == 10
        narrow = [tensor.bfloat16() for tensor in tokens(1)]
        assert layer.update(*narrow)[0].dtype == torch.float32


def test_one_thread_gets_the_place():
    layer, _ = grown(5, 1)
    forks = [copy.copy(layer) for _ in range(8)]
    new = [tokens(1) for _ in forks]
    expected = [torch.cat([layer.keys, keys], 2) for keys, _ in new]

    def add(fork, more):
        with torch.no_grad():
            return fork.update(*more)[0]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(add, forks, new))
    assert all(map(torch.equal, found, expected))


def test_what_is_replaced_is_not_kept():
    changes = (
        lambda layer: layer.reset(),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(2),
    )
    for change in changes:
        layer, _ = grown(5, 1)
        address = layer.keys.data_ptr()
        with torch.no_grad():
            change(layer)
        # Older versions empty a layer by zeros in its place.
        moved = layer.keys is None or layer.keys.data_ptr() != address or not layer.keys.any()
        assert layer._room is None and moved


def test_a_file_holds_what_was_written_alone():
    layer, plain = grown(5, 1)
    assert len(pickle.dumps(layer)) < len(pickle.dumps(plain)) + 500
    file = io.BytesIO()
    torch.save(layer.keys, file)  # writes the view's whole storage
    file.seek(0)
    storage = torch.load(file).untyped_storage()
    loaded = torch.tensor([], dtype=torch.float32).set_(storage).view(2, 3, -1, 4)
    assert torch.equal(loaded[:, :, :6], layer.keys) and not loaded[:, :, 6:].any()


def test_a_view_shortened_by_its_data_overwrites_nothing():
    layer, _ = grown(5, 1)
    earlier, kept = layer.keys.view_as(layer.keys), layer.keys.clone()
    layer.keys.data, layer.values.data = layer.keys.data[:, :, :4], layer.values.data[:, :, :4]
    with torch.no_grad():
        assert layer.update(*tokens(1))[0].shape[2] == 5
    assert torch.equal(earlier, kept)


def test_tokens_that_come_later_do_not_disturb_a_backward():
    layer, _ = grown(5, 1)
    weight = torch.ones(4, requires_grad=True)
    loss, expected = (layer.keys * weight).sum(), layer.keys.sum((0, 1, 2))
    with torch.no_grad():
        layer.update(*tokens(1))
    loss.backward()
    assert relative_error(weight.grad, expected) < 1e-6


def test_wider_values_are_not_narrowed():
    layer, plain = MemoryDynamicLayer(), DynamicLayer()
    with torch.no_grad():
        for wide in (True, False):
            keys, values = tokens(2)
            for each in (layer, plain):
                each.update(keys, values.double() if wide else values)
    assert layer.values.dtype == plain.values.dtype and torch.equal(layer.values, plain.values)


def test_an_update_that_was_replaced_is_not_gone_past(monkeypatch):
    from transformers.cache_utils import DynamicLayer

    model, seen = loud_adapter(patch_model(tiny_model())), []
    cache, own = DynamicCache(config=model.config), DynamicLayer.update

    def update(self, keys, values, *args, **kwargs):
        seen.append(keys.shape[2])
        return own(self, keys, values, *args, **kwargs)

    with torch.no_grad():
        model(IDS[:, :3], past_key_values=cache)
        monkeypatch.setattr(DynamicLayer, "update", update)
        model(IDS[:, 3:4], past_key_values=cache)
    assert seen == [1] * 3


# --- the cache's name


@torch.no_grad()
def test_a_decoder_that_calls_its_cache_cache():
    """As those of transformers do from 5.24 on."""
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(3))
    model = tiny_model()
    old = type(model.model)

    class Newer(old):
        def forward(self, input_ids=None, attention_mask=None, cache=None, **kwargs):
            name = cache_name(old.forward)
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **{name: cache}, **kwargs)

    assert cache_name(Newer.forward) == "cache"
    model.model.__class__ = Newer
    loud_adapter(patch_model(model))
    whole = model.model(input_ids=ids).last_hidden_state
    cache = DynamicCache(config=model.config)
    parts = [model.model(input_ids=part, cache=cache).last_hidden_state for part in ids.split(5, 1)]
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5 and memory_state(cache)[0].norm() > 0
    memory, cache = MemoryState.zeros(model, 2), DynamicCache(config=model.config)
    parts = [model.model(input_ids=part, cache=cache, memory=memory).last_hidden_state for part in ids.split(5, 1)]
    assert relative_error(torch.cat(parts, 1), whole) < 1e-5
    with memory_disabled(model):
        model.model(input_ids=ids, cache=cache)
    with pytest.raises(ValueError, match="memory was disabled"):
        model.model(input_ids=ids, cache=cache, memory=memory)
