"""Nothing that a user says is in logs, on the terminal, in what others are told, or in files but his own session's."""

import json
from types import SimpleNamespace

import pytest
from leaks import WORD, files_with
from serving_support import KEY, NAME, chat, engine_of, http, listening, served_model
from session_support import tiny_session
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import MemoryBank, MemorySession, MemoryState, ingest
from deltamem_fast.serving import engine as engine_module
from deltamem_fast.text.answering import warn_if_cut_off


def test_a_session_keeps_its_words_in_its_own_file(silent, tmp_path):
    session = tiny_session(chatml_tokenizer(), generation={"max_new_tokens": 4}, context_turns=1)
    session.answer(f"My name is {WORD}.")
    session.ingest(f"{WORD} keeps bees.")
    session.save(tmp_path / "ada")
    MemorySession.load(tmp_path / "ada", session.model, session.tokenizer)
    session.memory.save(tmp_path / "memory.safetensors")
    assert files_with(tmp_path) == ["session.json"]
    assert WORD not in repr(session) + repr(session.memory)
    session.forget(f"My name is {WORD}.", messages=True)
    session.drop_context()
    session.save(tmp_path / "ada")
    assert files_with(tmp_path) == []


def test_an_answer_that_was_cut_off_is_not_logged(silent, caplog):
    stream = SimpleNamespace(thinks=True, ids=[1, 2, 3], answer=f"{WORD} is here.")
    warn_if_cut_off("session", stream)
    assert "session: the answer was cut off before its thinking ended, after 3 tokens" in caplog.text


def test_a_bank_holds_no_words(silent, tmp_path):
    model, tokenizer = served_model()
    memory = MemoryState.zeros(model)
    ingest(model, tokenizer, memory, f"{WORD} lives in Lisbon.")
    with MemoryBank(tmp_path / "users.bank", model) as bank:
        bank.commit(["ada"], memory)
        bank.export_all(tmp_path / "out")
        assert files_with(tmp_path) == []
    assert files_with(tmp_path) == []


@pytest.mark.parametrize("streams", [False, True])
def test_a_server_tells_nobody_what_others_said(silent, tmp_path, monkeypatch, streams):
    """Turns, refusals, and errors of every stage; each quotes the word, as libraries do."""

    def ask(address, said=WORD, **more):
        body = {"model": NAME, "messages": chat(f"I am {said}."), "max_tokens": 2, "stream": streams} | more
        return http(address, "POST", "/v1/chat/completions", json.dumps(body).encode())

    def broken(*_, **__):
        raise KeyError(f"I am {WORD}.") from ValueError(WORD)

    with engine_of(*served_model(), tmp_path / "users.bank") as engine, listening(engine, KEY) as address:
        assert ask(address, memory_id="ada")[0] == 200
        forget = {"memory_id": "ada", "text": f"I am {WORD}."}
        assert http(address, "POST", "/v1/forget", json.dumps(forget).encode())[0] == 200
        assert ask(address, messages=[{"role": WORD, "content": WORD}])[0] == 400  # he is told what he said
        assert ask(address, stop=[], user=WORD)[0] == 400
        assert http(address, "PUT", "/v1/memories/bob", WORD.encode())[0] == 400
        for place, name in ((engine_module, "answer_rows_from"), (engine._intake, "job"), (engine.bank, "list")):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, broken)
                if name == "list":
                    status, told, _ = http(address, "GET", "/v1/memories")
                else:
                    status, told, _ = ask(address, memory_id="ada")
            assert WORD.encode() not in told and b"its log says more" in told
            assert status == (200 if streams and name == "answer_rows_from" else 500)
        status, told, _ = ask(address, "nobody", memory_id="bob")
        assert status == 200 and WORD.encode() not in told
        for path in ("/metrics", "/health", "/v1/memories", "/v1/memories/bob"):
            assert WORD.encode() not in http(address, "GET", path)[1]
    assert files_with(tmp_path) == []


def test_a_failed_batch_says_to_nobody_what_was_said(silent, tmp_path, monkeypatch, caplog):
    from serving_support import together

    with engine_of(*served_model(), tmp_path / "users.bank") as engine:
        from deltamem_fast.serving.contract import ChatRequest

        def broken(*_, **__):
            raise RuntimeError(WORD)

        monkeypatch.setattr(engine_module, "answer_rows_from", broken)

        def asked(name):
            request = ChatRequest(model=NAME, messages=chat(f"{WORD}."), memory_id=name, max_tokens=1)
            return engine.chat(request, lambda *piece: None).done.result(20)

        told = together(engine, {name: (lambda name=name: asked(name)) for name in ("ada", "bob")})
    assert all(WORD not in str(error) and "its batch has failed" in str(error) for error in told.values())
    assert "a batch of 2 has failed: RuntimeError" in caplog.text
