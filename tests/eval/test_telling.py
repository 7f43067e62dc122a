"""Documents told in windows, chunks and batches write what one plain forward a window writes."""

import pytest
import torch
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import DeltaMemConfig, patch_model
from deltamem_fast.eval import telling
from deltamem_fast.eval.telling import difference, remember, tell, tell_plainly, windows_of

TEXTS = [
    ["Ada took the train home.", "My dog is called Rex. It was a good day.", "She went to the market."],
    ["My sister lives in Paris."],
    [],
    ["The user asks a question and the assistant answers it. " * 6, "What does the user do?"],
]
CONFIGS = {
    "tsw": DeltaMemConfig.tsw(output_init="random"),
    "ssw": DeltaMemConfig.ssw(output_init="random"),
    "msw": DeltaMemConfig.msw(2, output_init="random"),
}


@pytest.fixture(scope="module", params=[("tsw", "qwen3"), ("ssw", "qwen3"), ("msw", "mistral")])
def model(request):
    strategy, family = request.param
    model = tiny_model(family, vocab_size=512)
    patch_model(model, CONFIGS[strategy], backend="reference")
    return loud_adapter(model)


@pytest.mark.parametrize(("window", "chunk", "batch"), [(40, 7, 3), (40, 64, 2), (200, 16, 4), (64, 0, 1)])
def test_as_plain_forwards(model, window, chunk, batch):
    tokenizer = chatml_tokenizer()
    documents = [windows_of(model, tokenizer, parts, window) for parts in TEXTS]
    assert all(len(piece) <= window for windows in documents for piece in windows) and documents[2] == []
    told = tell(model, documents, chunk=chunk, batch=batch)
    assert told.tokens == tuple(sum(map(len, windows)) for windows in documents) and told.memory.batch_size == 4
    for row, windows in enumerate(documents):
        assert difference(told.memory.select([row]), tell_plainly(model, windows)) < 1e-4
    assert not told.memory.select([2])[0].any() and told.memory.select([1])[0].any()


def test_nothing_to_tell(model):
    assert tell(model, []).memory.batch_size == 0 and tell(model, [[]]).tokens == (0,)
    assert remember(model, []) == [] and remember(model, [[]])[0].seconds == 0.0


def test_what_telling_costs(model, monkeypatch):
    """The seconds of all are shared by tokens; each memory is the document's own."""
    monkeypatch.setattr(telling.Stopwatch, "seconds", lambda self: 12.0)
    documents = [windows_of(model, chatml_tokenizer(), parts, 64) for parts in TEXTS]
    found = remember(model, documents, chunk=16, batch=3)
    tokens = [sum(map(len, windows)) for windows in documents]
    assert [one.tokens for one in found] == tokens and tokens[2] == 0
    assert [one.seconds for one in found] == pytest.approx([12.0 * count / sum(tokens) for count in tokens])
    for one, windows in zip(found, documents):
        assert one.memory.batch_size == 1 and difference(one.memory, tell_plainly(model, windows)) < 1e-4


def test_the_difference_is_one(model):
    windows = [windows_of(model, chatml_tokenizer(), parts, 64) for parts in TEXTS[:2]]
    first, second = (tell_plainly(model, one) for one in windows)
    assert difference(first, first) == 0 and difference(first, second) > 0.01
    twice = first.clone()
    for layer, state in twice.items():
        twice.put(layer, 2 * state, in_place=True)
    assert difference(first, twice) == pytest.approx(0.5)
    assert difference(first.clone().zero_(), first.clone().zero_()) == 0


def test_without_a_chat_template(model):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = None
    windows = windows_of(model, tokenizer, TEXTS[0], 512)
    assert len(windows) == 1 and torch.equal(
        windows[0].ids[0], torch.tensor(tokenizer("\n\n".join(TEXTS[0]))["input_ids"])
    )
