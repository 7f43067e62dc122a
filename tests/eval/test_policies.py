"""Policies by name, what retrieval finds, and a context that is extended."""

import sys
import types

import pytest
import torch
from support import tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast.errors import DeltaMemError
from deltamem_fast.eval.extension import extended, trained_length
from deltamem_fast.eval.policies import Policy, policy_named
from deltamem_fast.eval.retrieval import chunks_of, finder_for, selected

PARTS = ["Ada took the train home. She likes the market.", "", "My dog is called Rex. It was a good day for the dog."]


@pytest.mark.parametrize("name", ["nothing", "last-2048", "everything", "yarn", "bm25-4", "dense-1"])
def test_names(name):
    policy = policy_named(name)
    assert policy.name == name and policy_named(policy.name) == policy


@pytest.mark.parametrize(
    "name",
    [
        "",
        "all",
        "last",
        "last-",
        "last-0",
        "last--1",
        "last-x",
        "last-1.5",
        "bm25-",
        "everything-3",
        "last-²",
        "nothing-",
    ],
)
def test_no_names(name):
    with pytest.raises(DeltaMemError, match="policy: got .*allowed nothing, last-TOKENS"):
        policy_named(name)


def test_chunks_are_whole_sentences_and_cross_no_part():
    tokenizer = chatml_tokenizer()
    chunks = chunks_of(tokenizer, PARTS, tokens=12)
    assert " ".join(chunks).split() == " ".join(PARTS).split()
    assert all(len(tokenizer(chunk)["input_ids"]) <= 12 for chunk in chunks)
    assert not any("market" in chunk and "dog" in chunk for chunk in chunks)
    assert len(chunks_of(tokenizer, PARTS, tokens=500)) == 2


def test_bm25_finds_and_keeps_the_order_of_the_text():
    chunks = ["the cat sat", "a dog barked", "rain fell all day", "the dog slept"]
    policy = Policy("bm25", 2)
    find = finder_for(policy, chunks)
    assert sorted(find("Which dog?")) == [1, 3]
    assert selected(policy, chunks, find, "Which dog slept?") == "a dog barked\n\nthe dog slept"
    assert len(find("zebra")) == 2 and len(find("?!")) == 2  # nothing found is no error
    assert finder_for(Policy("bm25", 9), chunks)("dog") == [0, 1, 2, 3]
    assert finder_for(policy, [])("dog") == []


def test_dense_retrieval_takes_any_embedder(monkeypatch):
    from deltamem_fast.eval import retrieval

    words = ["cat", "dog", "rain"]

    class Embedder:
        def encode(self, texts, **_):
            found = torch.tensor([[float(text.count(word)) for word in words] for text in texts]) + 1e-3
            return torch.nn.functional.normalize(found, dim=1).numpy()

    monkeypatch.setattr(retrieval, "load_embedder", lambda name: Embedder())
    find = finder_for(Policy("dense", 1), ["a cat", "dog and dog", "rain"], "mine")
    assert find("my dog") == [1] and find("rain rain") == [2]


def test_dense_retrieval_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DeltaMemError, match="policy dense: needs the package sentence_transformers"):
        finder_for(Policy("dense", 1), ["a", "b"])


def test_an_embedders_code_is_not_run(monkeypatch):
    from deltamem_fast.eval.retrieval import load_embedder

    asked = []
    library = types.ModuleType("sentence_transformers")
    library.__version__ = "5.1.0"  # which runs what lies in a directory, whatever it is told
    library.SentenceTransformer = lambda *arguments, **options: asked.append((arguments, options))
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    load_embedder.cache_clear()
    with pytest.raises(DeltaMemError, match="policy dense: got sentence-transformers 5.1.0, allowed 6 or newer"):
        load_embedder("somebody's")
    assert not asked
    library.__version__ = "10.0.1.dev0"
    load_embedder("somebody's")
    load_embedder.cache_clear()
    assert asked == [(("somebody's",), {"trust_remote_code": False})]


def ids(count):
    return torch.randint(3, 120, (1, count), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "llama", "smollm3"])
def test_yarn_is_transformers_own_and_is_taken_back(family):
    model = tiny_model(family, max_position_embeddings=64)
    before = model(ids(90)).logits
    with extended(model, 96) as factor:
        inside = model(ids(90)).logits
        assert trained_length(model) == 64 and model.config.max_position_embeddings == 128
        with pytest.raises(DeltaMemError, match="extended already"), extended(model, 200):
            pass
    assert factor == 2 and trained_length(model) == model.config.max_position_embeddings == 64
    assert torch.equal(model(ids(90)).logits, before) and not torch.equal(inside, before)
    theta = model.config.rope_parameters["rope_theta"]
    own = tiny_model(
        family,
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": theta,
        },
    )  # fmt: skip
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(inside, own(ids(90)).logits)


def test_yarn_changes_nothing_that_fits_and_refuses_what_is_scaled():
    model = tiny_model(max_position_embeddings=64)
    rotary = model.model.rotary_emb
    with extended(model, 64) as factor:
        assert factor == 1 and model.model.rotary_emb is rotary
    model.config.rope_parameters["rope_type"] = "linear"
    with pytest.raises(DeltaMemError, match="policy yarn: the positions are scaled already"), extended(model, 65):
        pass
    model = tiny_model(max_position_embeddings=64)
    with pytest.raises(RuntimeError), extended(model, 128):
        raise RuntimeError
    assert model.config.max_position_embeddings == 64
