"""An error or an interrupt in the middle of an operator or of generate: a caller's memory is what it was."""

import copy

import pytest
import torch
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from deltamem_fast import DeltaMemConfig, MemoryState, forget, ingest, patch_model, revise
from deltamem_fast.adapter.wrappers import decoder_of
from deltamem_fast.memory import telling

TEXT = "Ada went to the market. She took the train; then she went home. Where is my dog? He is in Paris. "
ERRORS = (KeyboardInterrupt, MemoryError)


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="module", params=("tsw numba", "tsw reference", "ssw numba"))
def model(request, tokenizer):
    strategy, backend = request.param.split()
    config = DeltaMemConfig.ssw("sentence_mean") if strategy == "ssw" else DeltaMemConfig()
    return loud_adapter(patch_model(tiny_model(vocab_size=len(tokenizer)), config, backend=backend))


@pytest.fixture
def memory(model, tokenizer):
    memory = MemoryState.zeros(model)
    ingest(model, tokenizer, memory, "My dog is called Rex.")
    memory._skipped[1] += 3
    return memory


def seen(memory):
    """Everything of a memory, and where it lies."""
    parts = (memory._layers, memory._skipped)
    return [(i, t.data_ptr(), t.numpy().tobytes()) for part in parts for i, t in part.items()] + [memory._broken]


def breaks(model, after, error):
    """A hook that raises in the last layer's MLP: its ``after``th forward."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == after:
            raise error("now")

    return decoder_of(model).layers[-1].mlp.register_forward_pre_hook(hook)


OPERATORS = {
    "ingest": (3, lambda m, t, s: ingest(m, t, s, TEXT * 3, tokens=40)),
    "revise": (2, lambda m, t, s: revise(m, t, s, TEXT, replaces="My dog is called Rex.")),
    "forget": (1, lambda m, t, s: forget(m, t, s, TEXT)),
    "method": (1, lambda m, t, s: s.forget(m, t, TEXT)),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(model, tokenizer, memory, name, error):
    after, run = OPERATORS[name]
    before, expected = seen(memory), memory.clone()
    hook = breaks(model, after, error)
    with pytest.raises(error):
        run(model, tokenizer, memory)
    hook.remove()
    assert seen(memory) == before
    # and goes on as if nothing had happened
    assert run(model, tokenizer, memory) == run(model, tokenizer, expected) > 10
    assert all(torch.equal(memory[i], expected[i]) for i in memory) and seen(memory) != before


def test_decay_and_zero_in_the_middle(model, memory, monkeypatch):
    put, before = MemoryState.put, memory.clone()

    def fails(self, layer, *args, **kwargs):
        if layer == 1:
            raise KeyboardInterrupt
        put(self, layer, *args, **kwargs)

    for operator, whole in ((lambda: memory.decay(0.5), True), (lambda: memory.zero_(), False)):
        monkeypatch.setattr(MemoryState, "put", fails)
        with pytest.raises(KeyboardInterrupt):
            operator()
        monkeypatch.setattr(MemoryState, "put", put)
        if whole:
            assert all(torch.equal(memory[i], before[i]) for i in before)
            memory.check_whole()
        else:
            with pytest.raises(RuntimeError, match=r"zero_\(\) was cut short"):
                memory.check_whole()
    memory.zero_().check_whole()


def test_forget_in_the_middle_of_its_erasing(model, tokenizer, memory, monkeypatch):
    before, told = seen(memory), telling.writes_of

    def second(adapter, *arguments):
        if adapter.layer_idx == 1:
            raise KeyboardInterrupt
        return told(adapter, *arguments)

    monkeypatch.setattr(telling, "writes_of", second)
    with pytest.raises(KeyboardInterrupt):
        forget(model, tokenizer, memory, TEXT)
    assert seen(memory) == before


class Fails(LogitsProcessor):
    def __init__(self, error, after=3):
        self.error, self.left = error, after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise self.error("now")
        return scores


@pytest.mark.parametrize("kind", (None, DynamicCache, StaticCache))
@pytest.mark.parametrize("error", ERRORS)
def test_generate(model, tokenizer, memory, error, kind):
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    given = {"max_new_tokens": 6, "do_sample": False}
    if kind is not None:
        size = {"max_cache_len": 80} if kind is StaticCache else {}
        given["past_key_values"] = kind(config=model.config, **size)
    before, expected, empty = seen(memory), memory.clone(), copy.deepcopy(given)
    with pytest.raises(error):
        model.generate(ids, memory=memory, logits_processor=LogitsProcessorList([Fails(error)]), **given)
    assert seen(memory) == before
    for _ in range(2 * (kind is not None)):  # the cache is ahead of the memory
        message = f"past_key_values: a forward with this cache was cut short by {error.__name__}"
        with pytest.raises(RuntimeError, match=message), torch.no_grad():
            model(ids[:, :1], memory=memory, past_key_values=given["past_key_values"])
    if kind is StaticCache:
        given["past_key_values"].reset()  # an empty one begins anew
    else:
        given = copy.deepcopy(empty)
    found = model.generate(ids, memory=memory, **given)
    assert torch.equal(found, model.generate(ids, memory=expected, **empty))
    assert all(torch.equal(memory[i], expected[i]) for i in memory)


class Prints:
    """A streamer that fails at its third call."""

    def __init__(self):
        self.calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls == 3:
            raise BrokenPipeError("now")

    def end(self):
        pass


def stops(input_ids, scores, **_):
    raise BrokenPipeError("now")


@pytest.mark.parametrize("kind", (DynamicCache, StaticCache))
@pytest.mark.parametrize("given", ({"streamer": Prints}, {"stopping_criteria": lambda: [stops]}))
def test_generate_with_a_memory_of_the_caches(model, tokenizer, given, kind):
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    cache = kind(config=model.config, **({"max_cache_len": 80} if kind is StaticCache else {}))
    with pytest.raises(BrokenPipeError):
        model.generate(ids, past_key_values=cache, max_new_tokens=4, **{name: made() for name, made in given.items()})
    with pytest.raises(RuntimeError, match="past_key_values: a forward with this cache was cut short by BrokenPipe"):
        model.generate(torch.cat([ids, ids], 1), past_key_values=cache, max_new_tokens=4)
    frozen = MemoryState.zeros(model)
    frozen.frozen, cache = True, DynamicCache(config=model.config)
    with pytest.raises(BrokenPipeError):
        model.generate(ids, memory=frozen, past_key_values=cache, max_new_tokens=4, streamer=Prints())
    with pytest.raises(RuntimeError, match="past_key_values: .* cut short by BrokenPipe"):
        model.generate(ids, memory=frozen, past_key_values=cache, max_new_tokens=4)
    model.generate(ids, memory=frozen, max_new_tokens=1)


def test_a_cache_that_was_used_before_goes_on_after_a_failure_before_its_first_forward(model, tokenizer, memory):
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache, memory=memory, **segments(model))
    again, other = copy.deepcopy(cache), memory.clone()
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, memory=memory, past_key_values=cache, max_new_tokens=2)
    hook.remove()
    found = model.generate(ids, memory=memory, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert torch.equal(
        found, model.generate(ids, memory=other, past_key_values=again, max_new_tokens=2, do_sample=False)
    )


def segments(model):
    return {"segment_ids": -1} if model.model._delta_memory_patch.identity.config.segmented else {}


def test_a_memory_on_a_graph_keeps_it(tokenizer):
    model = loud_adapter(patch_model(tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1), backend="reference"))
    memory = MemoryState.zeros(model)
    model(torch.tensor([[3, 4, 5]]), memory=memory, use_cache=False)
    held = memory[0]
    hook = breaks(model, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        ingest(model, tokenizer, memory, TEXT * 3, tokens=40)
    hook.remove()
    assert memory[0] is held and held.requires_grad
    held.sum().backward()
