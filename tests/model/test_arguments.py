"""Arguments that cannot be right: an error of this package that names the argument, from every public function."""

import functools
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from support import tiny_model
from tokenizers_for_tests import chatml_tokenizer

import deltamem_fast
from deltamem_fast import MemorySession, MemoryState, patch_model, segment_ids_from_messages
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
