"""Arguments that cannot be right: an error of this package that names the argument, from every public function."""

import contextlib
import functools
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from support import tiny_model
from tokenizers_for_tests import chatml_tokenizer
from transformers import DynamicCache

import deltamem_fast
from deltamem_fast import (
    DeltaMemConfig,
    MemorySession,
    MemoryState,
    memory_disabled,
    patch_model,
    segment_ids_from_messages,
)
from deltamem_fast.errors import DeltaMemError
from deltamem_fast.training.options import TrainingOptions

FOLDER = tempfile.TemporaryDirectory()
HUGE, HALF = 10**400, "a\udcffb"
DEEP = functools.reduce(lambda inside, _: [inside], range(3000), [])
ODD = (10**5000, DEEP, {"a": DEEP}, "x" * 5000)  # repr raises, or goes on and on
SAYS_HALF = [{"role": "user", "content": HALF}]


@functools.cache
def model():
    return patch_model(tiny_model(vocab_size=len(chatml_tokenizer()) + 8), backend="reference")


@functools.cache
def bank():
    return deltamem_fast.MemoryBank(Path(FOLDER.name) / "users.bank", model())


def memory(rows=1):
    return MemoryState.zeros(model(), rows)


def with_tokenizer(name, **given):
    """Calls an operator, or a session's method, with one argument replaced."""

    def call(value):
        arguments = {"model": model(), "tokenizer": chatml_tokenizer(), "memory": memory(), "text": "Hi."}
        for key, place in given.items():
            arguments[key] = value if place is ... else place
        text = arguments.pop("text")
        first = [arguments.pop(key) for key in ("model", "tokenizer", "memory")]
        return getattr(deltamem_fast, name)(*first, text, **arguments)

    return call


CASES = [
    ("batch_size", lambda v: MemoryState.zeros(model(), v), (True, -1, 1.5, HUGE, 2**63, float("nan"), None, "1")),
    ("rows", lambda v: memory(2).select(v), (None, "x", b"x", [None], HUGE, [2], -3, {}, object(), [0.5], [True])),
    ("times", lambda v: memory().repeat(v), (True, 0, HUGE, 2.0, None)),
    ("memories", MemoryState.cat, (None, 3, "x", [], [None], [[]], object(), torch.zeros(2))),
    ("device", lambda v: memory().to(v), ("", "x", -1, 1.5, [], HUGE, "a\0b", HALF, torch.float32, object())),
    ("layer", lambda v: memory()[v], (99, [], {}, "x", None)),
    ("rate", lambda v: memory().decay(v), (True, -1, 2, HUGE, float("nan"), "x", None)),
    ("path", lambda v: memory().save(v), ("", "a\0b", b"x", None, 3, [], "x" * 5000)),
    ("directory", lambda v: deltamem_fast.save_adapter(model(), v), ("", "a\0b", b"x", None, 3, "x" * 5000)),
    ("adapter|directory", lambda v: deltamem_fast.load_adapter(model(), v), ("", "a\0b", None, 3, [], "/no/such")),
    ("adapter", lambda v: patch_model(tiny_model(), v), ("", "a\0b", "~nobody-has-this/x", 3, b"x", [], "x" * 5000)),
    ("text", with_tokenizer("ingest", text=...), (None, "", " ", 3, [], [None], HALF, SAYS_HALF)),
    ("text", with_tokenizer("forget", text=...), (None, "", HALF)),
    ("text", with_tokenizer("revise", text=...), (None, "", HALF)),
    ("text|question", with_tokenizer("retrieve", text=...), (None, "", HALF)),
    ("tokenizer", with_tokenizer("ingest", tokenizer=...), (None, 3, "x", int, lambda *a, **k: None)),
    ("strength", with_tokenizer("forget", strength=...), (True, -1, HUGE, float("nan"), "x")),
    ("tokens", with_tokenizer("ingest", tokens=...), (True, 0, -1, 1.5, "x")),
    ("system", lambda v: MemorySession(model(), chatml_tokenizer(), system=v), (HALF,)),
    (
        "template",
        lambda v: MemorySession(model(), chatml_tokenizer(), template=v),
        (True, 3, "x", [[]]),
    ),
    ("generation", lambda v: MemorySession(model(), chatml_tokenizer(), generation=v), (True, 3, "x", [1])),
    ("text", lambda v: MemorySession(model(), chatml_tokenizer()).answer(v), (None, "", HALF, SAYS_HALF, [None])),
    ("messages", lambda v: segment_ids_from_messages(chatml_tokenizer(), v, "message_mean"), (None, SAYS_HALF, "x")),
    ("target", lambda v: deltamem_fast.record_gates().__enter__().penalty(v), (None, "x", -1, True, float("nan"))),
    ("steps", lambda v: TrainingOptions("x", steps=v), (True, 0, HUGE, 2**63, 1.5, "x")),
    ("lr", lambda v: TrainingOptions("x", lr=v), (True, 0, HUGE, float("nan"), float("inf"), "x", None)),
    ("rows", lambda v: memory(2).select(v), ODD[:3]),
    ("times", lambda v: memory().repeat(v), ODD),
    ("device", lambda v: memory().to(v), ODD),
    ("layer", lambda v: memory()[v], ODD),
    ("rate", lambda v: memory().decay(v), ODD),
    ("layers", MemoryState, (None, 3, "x", [], {0: 1}, {0: torch.tensor(1.0)}, torch.zeros(2), *ODD)),
    ("ids", lambda v: bank().gather(v), (None, 3, "x", [None], [10**5000], [DEEP], torch.tensor(1.0), ["a", "a"])),
    ("order_by", lambda v: bank().list(order_by=v), (None, "x", torch.zeros(2), numpy.zeros(2), *ODD)),
    ("limit", lambda v: bank().list(limit=v), (True, -1, 1.5, *ODD[1:])),
    ("batch_size", lambda v: bank().export_all("x", batch_size=v), (True, 0, 1.5, *ODD)),
    ("format", lambda v: deltamem_fast.export_adapter(model(), "x", v), (None, "x", numpy.zeros(2), *ODD)),
    ("context_turns", lambda v: MemorySession(model(), chatml_tokenizer(), context_turns=v), (True, 0, 1.5, *ODD)),
    ("context_tokens", lambda v: MemorySession(model(), chatml_tokenizer(), context_tokens=v), (True, 0, 10**30)),
    ("strength", with_tokenizer("forget", strength=...), ODD),
    ("report_to", lambda v: TrainingOptions("x", report_to=v), (None, 3, "wandb", ("x",))),
]


@pytest.mark.parametrize(
    ("argument", "call", "values"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_argument_that_cannot_be_right_is_named(argument, call, values, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for value in values:
        with pytest.raises(DeltaMemError, match=f"^({argument})") as caught:
            call(value)
        assert isinstance(caught.value, ValueError | TypeError | OSError), value
        assert len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir())


PROMPT = torch.arange(12).reshape(2, 6) + 3
STARTS = torch.tensor([0, 2, 6], dtype=torch.int32)
PACKED = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 4, "max_length_k": 4}


@functools.cache
def segmented():
    return patch_model(tiny_model(), DeltaMemConfig.ssw("sentence_mean"), backend="reference")


def both_errors(model, call, *args, **given):
    """What a call says with a memory, and while it is disabled."""
    told = []
    for place in (contextlib.nullcontext(), memory_disabled(model)):
        with place, pytest.raises(DeltaMemError) as error:
            call(*args, **given)
        told.append((type(error.value), str(error.value)))
    return told


@pytest.mark.parametrize(
    "given",
    [
        {"trust": "x"}, {"trust": 2.0}, {"trust": torch.ones(2, 5)}, {"trust": torch.ones(2, 6).long()},
        {"trust": torch.full((2,), 1.5)}, {"memory": 3}, {"memory": MemoryState({})}, {"memory": 1},
        {"segment_ids": "x"}, {"segment_ids": torch.zeros(2, 5).long()}, {"segment_ids": torch.zeros(2, 6)},
        {"token_mask": "x"}, {"token_mask": torch.ones(2, 5)},
    ],
    ids=str,
)  # fmt: skip
def test_while_the_memory_is_disabled_its_arguments_are_checked_as_ever(given):
    if given.get("memory") == 1:  # too few rows
        given = {"memory": MemoryState.zeros(segmented())}
    cache = DynamicCache(config=segmented().config)
    for call, more in ((segmented(), {"past_key_values": cache}), (segmented().generate, {"max_new_tokens": 2})):
        with_memory, disabled = both_errors(segmented(), call, PROMPT, **given, **more)
        assert with_memory == disabled and next(iter(given)) in disabled[1]
    assert cache.get_seq_length() == 0
    with_memory, disabled = both_errors(model(), model(), PROMPT, segment_ids=PROMPT)
    assert with_memory == disabled and "writes every token" in disabled[1]


def test_while_the_memory_is_disabled_right_arguments_change_nothing():
    right = {
        "trust": torch.rand(2, 6),
        "segment_ids": torch.zeros(2, 6).long(),
        "memory": MemoryState.zeros(segmented(), 2),
    }
    packed = PACKED | {"memory": right["memory"], "trust": 0.5, "use_cache": False}
    with torch.no_grad(), memory_disabled(segmented()):
        assert torch.equal(segmented()(PROMPT, token_mask=PROMPT > 4, **right).logits, segmented()(PROMPT).logits)
        segmented()(PROMPT[:1], position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), **packed)  # a row a sequence
        whole, same = (segmented().generate(PROMPT, max_new_tokens=2, do_sample=False, **g) for g in ({}, right))
    assert torch.equal(whole, same) and not any(state.any() for _, state in right["memory"].items())
    packed |= {"memory": MemoryState.zeros(segmented(), 3)}
    with_memory, disabled = both_errors(segmented(), segmented(), PROMPT[:1], **packed)
    assert with_memory == disabled and "got 3 row(s), allowed 2" in disabled[1]


@pytest.mark.parametrize("name", ["trust", "segment_ids", "token_mask", "memory"])
def test_generate_batch_does_not_drop_what_it_cannot_follow(name):
    found = both_errors(model(), model().generate_batch, [[3, 4, 5]], **{name: 0.5})
    assert found[0] == found[1] and found[0][1].startswith(f"{name}: ")
