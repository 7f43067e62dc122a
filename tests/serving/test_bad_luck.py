"""What happens to others when something goes wrong with one request, or many wait."""

import gc
import json
import socket
import threading
import weakref

import pytest
import torch
from serving_support import KEY, NAME, ask, chat, engine_of, http, together

from deltamem_fast.serving import engine as engine_module
from deltamem_fast.serving.contract import ChatRequest
from deltamem_fast.serving.prompts import Prompt

WAITING = 48  # more than the 40 threads that Starlette has for calls that block


@pytest.fixture
def engine(served, tmp_path):
    with engine_of(*served, tmp_path / "users.bank", waiting=WAITING, answer=4) as engine:
        yield engine


def body(name: str, **more) -> bytes:
    return json.dumps({"model": NAME, "messages": chat("Hi."), "max_tokens": 1, "memory_id": name, **more}).encode()


@pytest.mark.parametrize("what", ["chat", "forget"])
def test_who_waits_holds_no_thread(engine, address, what):
    gate, began = threading.Event(), threading.Event()
    engine.call(lambda: (began.set(), gate.wait(60)), "gate")
    assert began.wait(20)
    statuses = []

    def wait(n):
        path, data = "/v1/chat/completions", body(f"user-{n}", stream=bool(n % 2))
        if what == "forget":
            path, data = "/v1/forget", json.dumps({"memory_id": f"user-{n}", "text": "Hi."}).encode()
        statuses.append(http(address, "POST", path, data)[0])

    threads = [threading.Thread(target=wait, args=(n,)) for n in range(WAITING)]
    for thread in threads:
        thread.start()
    while len(engine.queue) < WAITING:
        threading.Event().wait(0.01)
    listed = threading.Event()
    asking = threading.Thread(target=lambda: http(address, "GET", "/v1/memories")[0] == 200 and listed.set())
    asking.start()
    in_time = listed.wait(20)
    gate.set()
    for thread in [*threads, asking]:
        thread.join()
    # There is no memory yet of which anything could be forgotten.
    assert in_time and statuses == [200 if what == "chat" else 404] * WAITING
    assert len(engine.bank) == (WAITING if what == "chat" else 0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_that_failed_holds_no_tensors(engine, monkeypatch, count):
    made, gate = [], threading.Event()

    def broken(model, rows, options):
        tensor = torch.zeros(3)
        made.append(weakref.ref(tensor))
        raise RuntimeError("user-0 said something")

    monkeypatch.setattr(engine_module, "answer_rows", broken)
    engine.call(lambda: gate.wait(20), "gate")
    request = {"model": NAME, "messages": chat("Hi."), "memory": "none"}
    jobs = [engine.chat(ChatRequest(**request, user=f"{n}"), lambda *piece: None) for n in range(count)]
    gate.set()
    told = [job.done.exception(20) for job in jobs]
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    # Of a batch nobody is told what may be of another's request.
    assert all(("user-0" in str(error)) == (count == 1) for error in told)


def test_who_hangs_up_before_the_stream_begins_leaves_nothing(engine, client, address):
    came, go = threading.Event(), threading.Event()
    original, jobs = engine.chat, []

    def slow(*asked):
        came.set()
        go.wait(20)
        jobs.append(original(*asked))
        return jobs[0]

    gate = threading.Event()
    engine.call(lambda: gate.wait(20), "gate")
    engine.chat = slow
    data = body("ada", stream=True, max_tokens=4)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        assert came.wait(20)
    engine.chat = original
    threading.Event().wait(0.2)  # until the server has seen it
    go.set()
    while not jobs:
        threading.Event().wait(0.01)
    assert jobs[0].gone.wait(20)
    gate.set()
    assert ask(client, chat("Hi."), "ada").model_extra["memory"]["loaded"] == 0


def test_an_answer_that_the_template_refuses_is_its_own_requests(engine, client, monkeypatch):
    refused, original = [], Prompt.answer

    def answer(self, message):
        if not refused:
            refused.append(self)
        if self is refused[0]:
            raise ValueError("template: thinking is not for this one")
        return original(self, message)

    monkeypatch.setattr(Prompt, "answer", answer)
    names = ["ada", "ben", "cy"]
    found = together(engine, {name: lambda name=name: ask(client, chat("Hi."), name) for name in names})
    failed = [name for name in names if isinstance(found[name], Exception)]
    assert len(failed) == 1 and found[failed[0]].status_code == 500
    assert sorted(entry.id for entry in engine.bank.list()) == sorted(set(names) - set(failed))
    assert b"deltamem_batch_rows_sum 3.0" in engine.metrics.page()


def test_a_row_whose_logits_are_not_finite_ends_no_other(served, engine, client):
    model, _ = served

    def break_last(module, inputs, logits):
        return torch.cat([logits[:-1], torch.full_like(logits[-1:], torch.nan)])

    calls = {name: lambda name=name: ask(client, chat("Hi."), name, temperature=1.0) for name in ("ada", "ben")}
    hook = model.lm_head.register_forward_hook(break_last)
    try:
        found = together(engine, calls)
    finally:
        hook.remove()
    assert all(each.choices[0].finish_reason in ("stop", "length") for each in found.values()), found
    assert b"deltamem_batch_rows_sum 2.0" in engine.metrics.page()
    assert sorted(entry.id for entry in engine.bank.list()) == ["ada", "ben"]
