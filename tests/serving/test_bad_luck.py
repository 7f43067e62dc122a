"""What happens to others when something goes wrong with one request, or many wait."""

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
import weakref

import openai
import pytest
import torch
from serving_support import KEY, NAME, ask, chat, engine_of, greedy, http, row_of, together
from support import relative_error

from deltamem_fast import MemoryBank, MemoryState
from deltamem_fast.serving import engine as engine_module
from deltamem_fast.serving.app import make_app
from deltamem_fast.serving.contract import ChatRequest
from deltamem_fast.serving.prompts import Prompt
from deltamem_fast.serving.rows import answer_rows_from

WAITING = 48  # more than the threads that Starlette has for calls that block


@pytest.fixture
def engine(served, tmp_path):
    with engine_of(*served, tmp_path / "users.bank", waiting=WAITING, answer=4) as engine:
        yield engine


def body(name: str, **more) -> bytes:
    return json.dumps({"model": NAME, "messages": chat("Hi."), "max_tokens": 1, "memory_id": name, **more}).encode()


def until(true, seconds: float = 10) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def busy(engine):
    """Inside, the worker does nothing, and what comes waits."""
    gate, began = threading.Event(), threading.Event()
    engine.call(lambda: (began.set(), gate.wait(60)), "gate")
    try:
        assert began.wait(20)
        yield
    finally:
        gate.set()


@pytest.mark.parametrize("kind", ["answers", "streams", "calls"])
def test_who_waits_holds_no_thread(engine, address, kind):
    path = "/v1/forget" if kind == "calls" else "/v1/chat/completions"
    statuses = []

    def wait(n):
        forget = json.dumps({"memory_id": f"user-{n}", "text": "Hi."}).encode()
        data = forget if kind == "calls" else body(f"user-{n}", stream=kind == "streams")
        statuses.append(http(address, "POST", path, data)[0])

    threads = [threading.Thread(target=wait, args=(n,)) for n in range(WAITING)]
    listed = threading.Event()
    threads.append(threading.Thread(target=lambda: http(address, "GET", "/v1/memories")[0] == 200 and listed.set()))
    with busy(engine):
        for thread in threads[:-1]:
            thread.start()
        all_wait = until(lambda: len(engine.queue) == WAITING)
        threads[-1].start()
        in_time = listed.wait(10)
    for thread in threads:
        thread.join()
    assert all_wait and in_time
    # Of nobody's memory there is nothing to forget.
    assert statuses == [404 if kind == "calls" else 200] * WAITING
    assert len(engine.bank) == (0 if kind == "calls" else WAITING)


FAILING = {
    "the model": (engine_module, "answer_rows_from"),
    "the template": (Prompt, "answer"),
    "reading memories": (MemoryBank, "gather"),
    "storing memories": (MemoryBank, "commit"),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("what", FAILING)
def test_an_error_that_is_kept_holds_no_tensors(engine, monkeypatch, what, count):
    made, select = [], MemoryState.select

    def broken(*arguments, **more):
        tensor = torch.zeros(3)
        made.append(weakref.ref(tensor))
        raise RuntimeError("user-0 said something")

    def selected(self, places):  # a batch's memories, which those have that called what fails
        found = select(self, places)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(*FAILING[what], broken)
    monkeypatch.setattr(MemoryState, "select", selected)
    with busy(engine):
        request = {"model": NAME, "messages": chat("Hi."), "max_tokens": 1}
        jobs = [engine.chat(ChatRequest(**request, memory_id=f"user-{n}"), lambda *piece: None) for n in range(count)]
    told = [job.done.exception(20) for job in jobs]
    engine.call(lambda: None, "next").result(20)  # the worker is through with it
    gc.collect()
    assert made and not any(each() is not None for each in made)
    # Of a batch nobody is told what may be of another's request.
    assert all(("user-0" in str(error)) == (count == 1 or what != "the model") for error in told)


def test_an_error_of_a_call_holds_no_tensors(engine):
    made = []

    def broken():
        tensor = torch.zeros(3)
        made.append(weakref.ref(tensor))
        raise RuntimeError("broken")

    error = engine.call(broken, "ada").exception(20)
    gc.collect()
    assert str(error) == "broken" and made[0]() is None


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


@pytest.mark.parametrize("when", ["it waits", "its stream begins"])
def test_who_is_gone_when_leaves_nothing(engine, when):
    came, go, original, jobs = threading.Event(), threading.Event(), engine.chat, []

    def slow(*asked):
        came.set()
        assert when != "it waits" or go.wait(20)
        jobs.append(original(*asked))
        return jobs[0]

    async def receive():
        return {"type": "http.request", "body": body("ada", stream=True, max_tokens=4)}

    async def send(message):
        raise OSError("the client has hung up")

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST"}
    scope |= {"scheme": "http", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}

    async def begin_and_go():
        asking = asyncio.create_task(make_app(engine)(scope, receive, send))
        if when == "it waits":  # the server gives it up, as one does that is to end
            while not came.is_set():
                await asyncio.sleep(0.01)
            asking.cancel()
        await asyncio.wait([asking])
        go.set()

    engine.chat = slow
    with busy(engine):
        asyncio.run(begin_and_go())
        assert until(lambda: jobs) and len(engine.queue) == 1
        # Who comes next has the memory as it was.
        after = original(ChatRequest(model=NAME, messages=chat("Hi."), memory_id="ada"), lambda *piece: None)
    assert after.done.result(20).loaded == 0 and jobs[0].done.cancelled() and len(engine.queue) == 0


def alone(served, said, most=4):
    """The memory of who says something, by itself."""
    row = row_of(*served, chat(said), most)
    return answer_rows_from(served[0], [row], MemoryState.zeros(served[0]), False, greedy(*served), write=True)


def kept_alone(served, engine, said):
    """Whether the bank has the memories of those who said something, as if each were alone, and no other."""
    kept = {name: (engine.bank.gather([name]), alone(served, each)) for name, each in said.items()}
    return len(engine.bank) == len(kept) and all(
        relative_error(found[i], wanted[i]) < 1e-5 for found, wanted in kept.values() for i in wanted
    )


def bens_error(served, engine, client) -> str:
    """What Ben is told, of three in one batch, while the others are answered and remembered as if alone."""
    said = {"ada": "Hi.", "ben": "No.", "cy": "Where did Ada go?"}
    found = together(engine, {name: lambda name=name: ask(client, chat(said[name]), name) for name in said})
    assert isinstance(found["ben"], openai.APIStatusError)
    del said["ben"]
    assert all(found[name].choices[0].finish_reason in ("stop", "length") for name in said), found
    assert kept_alone(served, engine, said)
    assert b"deltamem_batch_rows_sum 3.0" in engine.metrics.page()
    return str(found["ben"])


def test_an_answer_that_the_template_refuses_is_its_own_requests(served, engine, client, monkeypatch):
    _, tokenizer = served
    refusing = "{%- if messages[0].content == 'No.' and messages | length > 1 -%}{{ raise_exception('no answer') }}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + "{%- endif -%}" + tokenizer.chat_template)
    assert "no answer" in bens_error(served, engine, client)


def test_a_row_whose_logits_are_not_finite_ends_no_other(served, engine, client):
    model, _ = served

    def break_last(module, inputs, logits):
        return torch.cat([logits[:-1], torch.full_like(logits[-1:], torch.nan)])

    # Drawn at random: one row of NaN would make torch refuse the whole batch.
    calls = {name: lambda name=name: ask(client, chat("Hi."), name, temperature=1.0) for name in ("ada", "ben")}
    hook = model.lm_head.register_forward_hook(break_last)
    try:
        found = together(engine, calls)
    finally:
        hook.remove()
    assert all(each.choices[0].finish_reason in ("stop", "length") for each in found.values()), found
    assert b"deltamem_batch_rows_sum 2.0" in engine.metrics.page()
    assert sorted(entry.id for entry in engine.bank.list()) == ["ada", "ben"]


def test_a_memory_that_is_not_finite_is_not_kept_and_others_are(served, engine, client, monkeypatch):
    def broken(model, rows, memory, known, options, **more):
        after = answer_rows_from(model, rows, memory, known, options, **more)
        place = next(n for n, row in enumerate(rows) if row.prompt.messages[0]["content"] == "No.")
        after[next(iter(after))][place] = torch.nan
        return after

    monkeypatch.setattr(engine_module, "answer_rows_from", broken)
    assert "'ben' hold NaN or Inf" in bens_error(served, engine, client)
