"""transformers' continuous batching: each request's tokens and memory are those of generate, whatever comes between."""

import types

import pytest
import torch
import transformers
from backbones import tiny
from support import loud_adapter, relative_error, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from deltamem_fast import DeltaMemConfig, MemoryState, memory_disabled, patch_model
from deltamem_fast.errors import DeltaMemError, StateError, UnsupportedError
from deltamem_fast.model import continuous

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17)
needs_newer = pytest.mark.skipif(OLD, reason="refused in this transformers")
PAGE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # before transformers 5.19
PROMPTS = [[(7 * i + 3 * n) % 120 + 3 for i in range(length)] for n, length in enumerate((21, 7, 3, 14, 9))]
NEW = 6


def settings(**changes):
    """Prompts in parts (16 tokens a batch); all of them fit in the cache."""
    return ContinuousBatchingConfig(
        **{"num_blocks": 16, PAGE: 16, "max_batch_tokens": 16, "allow_block_sharing": False} | changes
    )


def generation(**changes):
    return GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | changes
    )


def batch(model, prompts=PROMPTS, config=None, **given):
    config = settings() if config is None else config
    out = model.generate_batch(prompts, generation_config=generation(), continuous_batching_config=config, **given)
    assert all(result.error is None for result in out.values()), out
    return [result.generated_tokens for result in out.values()]


def alone(model, memory=None):
    """The tokens of each prompt by itself, and the memory after them."""
    tokens, rows = [], []
    for n, prompt in enumerate(PROMPTS):
        row = MemoryState.zeros(model) if memory is None else memory.select([n])
        given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "memory": row}
        tokens.append(model.generate(torch.tensor([prompt]), **given)[0, len(prompt) :].tolist())
        rows.append(row)
    return tokens, MemoryState.cat(rows)


def written(model):
    """A memory of as many rows as there are prompts, each with something else in it."""
    memory = MemoryState.zeros(model, len(PROMPTS))
    ids = torch.randint(3, 120, (len(PROMPTS), 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids, memory=memory, use_cache=False)
    return memory


def model_of(family="qwen3", config=None, attention="sdpa"):
    return loud_adapter(patch_model(tiny_model(family, attention), config))


@needs_newer
@pytest.mark.parametrize(
    "family, attention", [("qwen3", "sdpa"), ("qwen3", "eager"), ("smollm3", "sdpa"), ("mistral", "sdpa")]
)
def test_each_request_is_as_alone(family, attention):
    model = model_of(family, DeltaMemConfig(delta_heads=("q", "k", "v", "o")), attention)
    memory = written(model)
    expected, after = alone(model, memory)
    assert batch(model, memory=memory) == expected
    assert all(relative_error(memory[i], after[i]) < 1e-5 for i in memory)
    assert batch(model) == alone(model)[0] != expected  # without a memory each starts from zero


@needs_newer
def test_on_the_generic_path():
    config = DeltaMemConfig(delta_heads=("q", "k", "v", "o"))
    model = loud_adapter(patch_model(tiny("Olmo2ForCausalLM", sliding_window=None), config))
    memory = written(model)
    expected, after = alone(model, memory)
    assert batch(model, memory=memory) == expected
    assert all(relative_error(memory[i], after[i]) < 1e-5 for i in memory)


@needs_newer
def test_requests_that_are_thrown_out_start_again(monkeypatch):
    """A cache that is too small for all: transformers drops a request's keys and values, and reads it anew later."""
    from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

    thrown_out, own = [], OffloadingManager.offload_requests
    monkeypatch.setattr(OffloadingManager, "offload_requests", lambda self: thrown_out.append(1) or own(self))
    model = model_of()
    memory = written(model)
    expected, after = alone(model, memory)
    small = settings(num_blocks=6, max_batch_tokens=32, **{PAGE: 8})
    assert batch(model, config=small, memory=memory) == expected and thrown_out
    assert all(relative_error(memory[i], after[i]) < 1e-5 for i in memory)


@needs_newer
def test_a_frozen_memory_is_read_alone():
    model = model_of()
    memory = written(model)
    memory.frozen = True
    before = memory.clone()
    expected, _ = alone(model, memory)
    assert batch(model, memory=memory) == expected
    assert all(torch.equal(memory[i], before[i]) for i in memory)


@needs_newer
def test_segments_with_a_frozen_memory_alone():
    model = model_of(config=DeltaMemConfig.ssw())
    with pytest.raises(UnsupportedError, match="generate_batch: the adapter writes segments"):
        batch(model)
    memory = written(model)
    memory.frozen = True
    assert batch(model, memory=memory) == alone(model, memory)[0]


@needs_newer
def test_disabled_it_is_the_bare_model():
    bare = batch(tiny_model())
    model = model_of()
    with memory_disabled(model):
        assert batch(model) == bare
    assert batch(model) != bare


@needs_newer
def test_a_manager_of_ones_own():
    model = model_of()
    expected = alone(model)[0]
    manager = model.init_continuous_batching(generation_config=generation(), continuous_batching_config=settings())
    manager.start()
    try:
        manager.add_request(list(range(5, 25)), "cancelled", max_new_tokens=50)
        manager.cancel_request("cancelled")
        for n, prompt in enumerate(PROMPTS):
            manager.add_request(prompt, f"mine {n}")
        found = {}
        while len(found) < len(PROMPTS):
            result = manager.get_result(timeout=20)
            assert result is not None
            found[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True)
    assert [found[f"mine {n}"] for n in range(len(PROMPTS))] == expected


@needs_newer
def test_a_request_that_fails_changes_no_memory(monkeypatch):
    model = model_of()
    memory = written(model)
    before, calls = memory.clone(), []
    layer = model.model.layers[1].mlp

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(StateError, match=r"generate_batch: \d request\(s\) failed .*memory is what it was"):
        model.generate_batch(
            PROMPTS, generation_config=generation(), continuous_batching_config=settings(), memory=memory
        )
    assert all(torch.equal(memory[i], before[i]) for i in memory)
    handle.remove()
    expected, after = alone(model, memory)
    assert batch(model, memory=memory) == expected
    assert all(relative_error(memory[i], after[i]) < 1e-5 for i in memory)


@needs_newer
@pytest.mark.parametrize(
    "given, message",
    [
        ({"continuous_batching_config": ContinuousBatchingConfig()}, "allow_block_sharing is True, allowed False"),
        (
            {"continuous_batching_config": settings(use_async_batching=True)},
            "use_async_batching is True, allowed False",
        ),
        ({"continuous_batching_config": settings(use_cuda_graph=True)}, "use_cuda_graph is True, allowed False"),
        (
            {"generation_config": generation(num_return_sequences=2, do_sample=True)},
            "num_return_sequences: got 2",
        ),
        ({"persistent_manager": True}, "persistent_manager: got True, allowed False"),
        ({"memory": "rows"}, "memory: got str"),
        ({"memory": 2}, "memory: got 2 row.*allowed 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_memory_cannot_follow_is_refused(given, message):
    model = model_of()
    if given.get("memory") == 2:
        given = {"memory": MemoryState.zeros(model, 2)}
    with pytest.raises(DeltaMemError, match=message):
        model.generate_batch(PROMPTS, **{"generation_config": generation(), "warmup": False} | given)
    assert batch(model) == alone(model)[0]


def test_older_versions_are_refused(monkeypatch):
    # Where it is read: in a whole run, another module object was seen under this name here.
    monkeypatch.setattr(continuous, "transformers", types.SimpleNamespace(__version__="5.16.1"))
    with pytest.raises(UnsupportedError, match="generate_batch: transformers is 5.16.1, allowed 5.17 or newer"):
        model_of().generate_batch(PROMPTS, generation_config=generation())
