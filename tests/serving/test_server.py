"""The server over loopback, with OpenAI's client: answers, streams, memories, and every refusal."""

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from serving_support import KEY, NAME, ask, chat, engine_of, greedy, http, listening, row_of, served_model, together
from support import relative_error

from deltamem_fast import MemoryState, forget
from deltamem_fast.errors import FileFormatError
from deltamem_fast.serving.rows import answer_rows, answer_rows_from


@pytest.fixture
def engine(served, tmp_path):
    with engine_of(*served, tmp_path / "users.bank", waiting=8, tokens=200, answer=8, body=40_000) as engine:
        yield engine


def test_turns_are_those_of_a_replay_and_versions_tell_of_each(served, engine, client):
    model, tokenizer = served
    memory, version, messages = MemoryState.zeros(model), 0, []
    for said in ("My dog is called Rex.", "Where did Ada go?", "What is the name of my dog?"):
        messages += [{"role": "user", "content": said}]
        row = row_of(model, tokenizer, messages, 8)
        memory = answer_rows_from(model, [row], memory, bool(version), greedy(model, tokenizer), write=True)
        found = ask(client, messages, "ada")
        assert found.choices[0].message.content == row.answer
        assert found.choices[0].finish_reason == row.finish
        assert found.usage.prompt_tokens == len(row.prompt) and found.usage.completion_tokens == row.tokens
        told = found.model_extra["memory"]
        assert (told["id"], told["mode"], told["loaded"]) == ("ada", "write", version)
        assert told["version"] > version
        version = told["version"]
        messages += [{"role": "assistant", "content": row.answer}]
    kept = engine.bank.gather(["ada"])
    assert kept.bank_rows[0][1] == version
    assert all(torch.equal(kept[i], memory[i]) for i in kept)
    read = ask(client, chat("Ada?"), "ada", "read")
    assert read.model_extra["memory"] == {"id": "ada", "mode": "read", "loaded": version, "version": version}
    row = row_of(model, tokenizer, chat("Ada?"), 8)
    answer_rows_from(model, [row], kept, True, greedy(model, tokenizer), write=False)
    assert read.choices[0].message.content == row.answer


def test_the_page_asks_as_it_says(engine, client, address):
    page = Path(__file__).parents[2] / "docs/serving.md"
    code = re.search(r"^```py\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)[1]
    for shown, here in (("http://127.0.0.1:8000", address), ('"none"', f'"{KEY}"'), ('"smollm2"', f'"{NAME}"')):
        assert shown in code
        code = code.replace(shown, here)
    ask(client, chat("Ada lives in Lisbon."), "ada")
    names = {}
    exec(code, names)
    assert names["found"].memory["version"] == engine.bank.gather(["ada"]).bank_rows[0][1]


def test_without_a_memory_id_nothing_is_kept(served, engine, client):
    model, tokenizer = served
    found = ask(client, chat("My dog is called Rex."))
    assert found.model_extra["memory"] is None and len(engine.bank) == 0
    row = row_of(model, tokenizer, chat("My dog is called Rex."), 8)
    answer_rows_from(model, [row], MemoryState.zeros(model), False, greedy(model, tokenizer), write=True)
    assert found.choices[0].message.content == row.answer
    bare = row_of(model, tokenizer, chat("My dog is called Rex."), 8)
    answer_rows(model, [bare], greedy(model, tokenizer))
    found = ask(client, chat("My dog is called Rex."), "ada", "none")
    assert found.choices[0].message.content == bare.answer and len(engine.bank) == 0
    assert found.model_extra["memory"] == {"id": "ada", "mode": "none", "loaded": 0, "version": 0}


def test_a_stream_says_the_same_piece_by_piece(engine, client):
    whole = ask(client, chat("My dog is called Rex."), "whole")
    pieces, last = [], None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in ask(client, chat("My dog is called Rex."), "streamed", **options):
        if chunk.choices:
            pieces.append(chunk.choices[0].delta.content or "")
            if chunk.choices[0].finish_reason:
                last = chunk
        else:
            usage = chunk.usage
    assert "".join(pieces) == whole.choices[0].message.content and len([p for p in pieces if p]) > 1
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason and usage == whole.usage
    both = engine.bank.gather(["whole", "streamed"])
    assert last.model_extra["memory"]["version"] == both.bank_rows[1][1]
    assert all(relative_error(both[i][1], both[i][0]) < 1e-6 for i in both)


def test_requests_that_fit_go_together(engine, client):
    users = [f"user-{n}" for n in range(6)]
    found = together(engine, {name: lambda name=name: ask(client, chat("The market."), name) for name in users})
    assert len({found[name].choices[0].message.content for name in users}) == 1
    kept = engine.bank.gather(users)
    assert all(version for _, version, _ in kept.bank_rows)
    assert all(relative_error(kept[i], kept[i][:1].expand_as(kept[i])) < 1e-5 for i in kept)
    page = engine.metrics.page().decode()
    assert "deltamem_batch_rows_sum 6.0" in page and "deltamem_batch_rows_count 1.0" in page


@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
def test_a_batch_of_known_new_and_nobodys_memories_crosses_none(strategy, tmp_path):
    model, tokenizer = served_model(strategy)
    with engine_of(model, tokenizer, tmp_path / "users.bank", answer=4) as engine, listening(engine, KEY) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
            for name in ("b", "d"):
                ask(client, chat(f"My dog is called {name}."), name)
            before = {name: engine.bank.gather([name]) for name in "abcd"}
            names = ["a", None, "b", "c", None, "d"]
            asked = [
                [*chat(f"Where did {name} go?", "Home.", "Ada?")][-3 if n % 2 else -1 :] for n, name in enumerate(names)
            ]
            found = together(
                engine,
                {
                    place: lambda name=name, messages=messages: ask(client, messages, name)
                    for place, (name, messages) in enumerate(zip(names, asked))
                },
            )
        for place, (name, messages) in enumerate(zip(names, asked)):
            memory = MemoryState.zeros(model) if name is None else before[name]
            known = name in ("b", "d")
            row = row_of(model, tokenizer, messages, 4)
            after = answer_rows_from(model, [row], memory, known, greedy(model, tokenizer), write=True)
            assert found[place].choices[0].message.content == row.answer, place
            if name is not None:
                kept = engine.bank.gather([name])
                assert all(relative_error(kept[i], after[i]) < 1e-5 for i in kept), place
        assert [entry.id for entry in engine.bank.list()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
def test_a_turn_moves_a_memory_as_far_as_it_is_trusted(strategy, tmp_path):
    """A request's own trust below the server's, within its budget; a turn that is trusted wholly is guarded by none."""
    model, tokenizer = served_model(strategy)
    said, later = chat("My dog is called Rex."), chat("Where did Ada go?")
    limits = {"answer": 4, "trust": 0.5, "budget": 0.3}
    with engine_of(model, tokenizer, tmp_path / "users.bank", **limits) as engine, listening(engine, KEY) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
            wanted = {None: 0.5, 1.0: 0.5, 0.25: 0.25, 0.0: 0.0}
            for trust in wanted:
                ask(client, said, f"{trust}")
            before = {trust: engine.bank.gather([f"{trust}"]) for trust in wanted}
            together(
                engine,
                {trust: lambda trust=trust: ask(client, later, f"{trust}", trust=trust) for trust in wanted},
            )
            page = engine.metrics.page().decode()
        for trust, share in wanted.items():
            row, start = row_of(model, tokenizer, later, 4), before[trust]
            whole = answer_rows_from(model, [row], start, True, greedy(model, tokenizer), write=True, untrusted=True)
            kept = engine.bank.gather([f"{trust}"])
            assert (kept.bank_rows == start.bank_rows) is (share == 0)
            for i in kept:
                there, apart = (x.norm(dim=(-2, -1), keepdim=True) for x in (start[i], whole[i] - start[i]))
                wanted = torch.lerp(
                    start[i], whole[i], torch.where(there > 0, 0.3 * there / apart, share).clamp(max=share)
                )
                assert relative_error(kept[i], wanted) < 1e-5
                assert torch.equal(kept[i], start[i]) is (share == 0)
    assert "deltamem_batch_rows_count 5.0" in page  # four by themselves, then all in one batch


def test_a_guard_is_of_those_alone_that_are_not_trusted(tmp_path):
    """Beside a request that is held back, one that is trusted wholly has the bits of one without any."""
    model, tokenizer = served_model()
    for memory in model.modules():
        if hasattr(memory, "beta_bias"):
            memory.beta_bias.data.fill_(8.0)  # so that a guard is felt
    said = chat("My dog is called Rex.")
    with engine_of(model, tokenizer, tmp_path / "users.bank", answer=4) as engine, listening(engine, KEY) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
            asked = {"a": None, "b": 0.999999}
            together(engine, {name: lambda name=name: ask(client, said, name, trust=asked[name]) for name in asked})
        found = engine.bank.gather(["a", "b"])
        for name, untrusted in (("a", False), ("b", True)):
            row = row_of(model, tokenizer, said, 4)
            empty = MemoryState.zeros(model)
            alone = answer_rows_from(
                model, [row], empty, False, greedy(model, tokenizer), write=True, untrusted=untrusted
            )
            place = ["a", "b"].index(name)
            assert all(torch.equal(found[i][place], alone[i][0]) for i in found) or untrusted
            assert all(relative_error(found[i][place], alone[i][0]) < 1e-4 for i in found)
        assert any(relative_error(found[i][0], found[i][1]) > 0.01 for i in found)


def test_windows_and_sampling(tmp_path):
    model, tokenizer = served_model(family="mistral")
    with engine_of(model, tokenizer, tmp_path / "users.bank", answer=6) as engine, listening(engine, KEY) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
            row = row_of(model, tokenizer, chat("My dog is called Rex."), 6)
            answer_rows_from(model, [row], MemoryState.zeros(model), False, greedy(model, tokenizer), write=True)
            assert ask(client, chat("My dog is called Rex."), "ada").choices[0].message.content == row.answer
            hot = {"temperature": 2.0, "top_p": 0.9}
            drawn = [
                ask(client, chat("The market."), None, "read", seed=seed, **hot).choices[0].message.content
                for seed in (1, 1, 2, 3)
            ]
            assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_what_waits_is_told_that_the_server_goes_down(engine, client):
    gate, began = threading.Event(), threading.Event()
    call = engine.call(lambda: (began.set(), gate.wait(20)), "gate")
    assert began.wait(20)
    told = []

    def wait():
        with pytest.raises(
            openai.APIStatusError, match="server: is going down, and the request was not begun"
        ) as caught:
            ask(client, chat("Hi."), "ada")
        told.append(caught.value.status_code)

    thread = threading.Thread(target=wait)
    thread.start()
    while len(engine.queue) < 1:
        threading.Event().wait(0.01)
    engine.refuse()
    thread.join()
    with pytest.raises(openai.APIStatusError, match="server: is going down"):
        ask(client, chat("Hi."), "ada")
    gate.set()
    assert told == [503] and call.result(20) == (None, True) and "ada" not in engine.bank


def test_one_damaged_memory_is_its_owners_alone(engine, client):
    for name in ("ada", "ben"):
        ask(client, chat("My dog is called Rex."), name)
    gather = engine.bank.gather

    def damaged(ids, *more):
        if "ben" in ids:
            raise FileFormatError("bank: /home/somebody/users.bank: damaged: the memories of 'ben' hold NaN or Inf")
        return gather(ids, *more)

    engine.bank.gather = damaged
    found = together(engine, {name: lambda name=name: ask(client, chat("Hi."), name) for name in ("ada", "ben")})
    engine.bank.gather = gather
    assert found["ada"].model_extra["memory"]["loaded"] > 0
    assert found["ben"].status_code == 500 and "somebody" not in str(found["ben"])


def test_a_memory_that_moves_on_meanwhile_is_a_conflict(engine, client, address):
    ask(client, chat("My dog is called Rex."), "ada")
    elsewhere = engine.bank.gather(["ada"])

    def move_on(piece, thinking):
        if not moved:
            moved.append(engine.bank.commit(["ada"], elsewhere))

    moved = []
    original = engine.chat
    for stream in (False, True):
        moved.clear()
        engine.chat = lambda request, say, *more: original(request, lambda *it: (move_on(*it), say(*it)), *more)
        with pytest.raises(openai.APIError, match="moved on, so nothing was written") as caught:
            told = ask(client, chat("Where did Ada go?"), "ada", stream=stream)
            list(told if stream else ())
        if not stream:
            assert isinstance(caught.value, openai.ConflictError) and caught.value.status_code == 409
        engine.chat = original
    assert engine.bank.gather(["ada"]).bank_rows == elsewhere.bank_rows
    assert b"deltamem_memory_conflicts_total 2.0" in http(address, "GET", "/metrics")[1]
    assert ask(client, chat("Where did Ada go?"), "ada").model_extra["memory"]["loaded"] == elsewhere.bank_rows[0][1]


def test_who_hangs_up_leaves_nothing(engine, client):
    ask(client, chat("My dog is called Rex."), "ada")
    before = engine.bank.gather(["ada"]).bank_rows
    heard, go = threading.Event(), threading.Event()
    original = engine.chat

    def slow(request, say, *more):
        def wait(*piece):
            say(*piece)
            heard.set()
            go.wait(20)

        return original(request, wait, *more)

    engine.chat = slow
    stream = ask(client, chat("Where did Ada go?"), "ada", stream=True)
    iterator = iter(stream)
    next(iterator)
    assert heard.wait(20)
    stream.response.close()
    engine.chat = original
    threading.Event().wait(0.3)  # until the server has seen it
    go.set()
    # The next turn comes after it, and finds the memory as it was.
    assert ask(client, chat("Ada?"), "ada").model_extra["memory"]["loaded"] == before[0][1]


def test_a_memory_is_listed_taken_away_and_brought_back(served, engine, client, address):
    model, tokenizer = served
    for name in ("ada", "ben/home", "ada 2"):
        ask(client, chat("My dog is called Rex."), name)
    status, body, _ = http(address, "GET", "/v1/memories?prefix=ada&limit=1")
    listed = json.loads(body)
    assert status == 200 and listed["total"] == 3
    assert [(entry["id"], entry["bytes"] > 0) for entry in listed["data"]] == [("ada", True)]
    status, file, headers = http(address, "GET", "/v1/memories/ben%2Fhome")
    assert status == 200 and headers["content-type"] == "application/octet-stream"
    status, body, _ = http(address, "PUT", "/v1/memories/copy", file)
    assert status == 200 and json.loads(body)["id"] == "copy"
    kept = engine.bank.gather(["copy", "ben/home"])
    assert all(torch.equal(kept[i][0], kept[i][1]) for i in kept)
    status, body, _ = http(address, "PUT", "/v1/memories/copy", file)
    assert status == 409 and b"moved on" in body
    assert http(address, "PUT", "/v1/memories/copy?overwrite=true", file)[0] == 200
    status, body, _ = http(address, "PUT", "/v1/memories/other", file[:-9])
    assert status == 400 and b"body: " in body and b"/tmp" not in body and "other" not in engine.bank
    wanted = engine.bank.gather(["ada"])
    told = int(forget(model, tokenizer, wanted, "My dog is called Rex."))
    status, body, _ = http(
        address, "POST", "/v1/forget", json.dumps({"memory_id": "ada", "text": "My dog is called Rex."}).encode()
    )
    found = engine.bank.gather(["ada"])
    assert status == 200
    assert json.loads(body) == {"id": "ada", "tokens": told, "version": found.bank_rows[0][1]}
    assert all(torch.equal(found[i], wanted[i]) for i in found)
    assert http(address, "DELETE", "/v1/memories/ben%2Fhome")[:2] == (200, b'{"id":"ben/home","deleted":true}')
    for method, path, data in (
        ("DELETE", "/v1/memories/ben%2Fhome", None),
        ("GET", "/v1/memories/nobody", None),
        ("POST", "/v1/forget", b'{"memory_id": "nobody", "text": "Rex."}'),
    ):
        status, body, _ = http(address, method, path, data)
        assert status == 404 and b"allowed one that is in the bank" in body, (path, body)
    assert "ben/home" not in engine.bank and "nobody" not in engine.bank


def test_mistakes_are_named_and_nothing_is_kept(engine, client, address):
    def told(kind, status, said, messages=None, **more):
        with pytest.raises(kind, match=said) as caught:
            ask(client, chat("Hi.") if messages is None else messages, **({"memory_id": "ada"} | more))
        assert caught.value.status_code == status and caught.value.body["code"] == status

    bad, large = openai.BadRequestError, openai.APIStatusError
    told(bad, 400, "memory: got 'both'", memory="both")
    told(bad, 400, "memory_id: got '' of 0 bytes, allowed 1 to 512 bytes", memory_id="")
    told(bad, 400, "tools: got .*not supported here", tools=[{"type": "function", "function": {"name": "f"}}])
    told(bad, 400, "messages: got 'assistant' at the end", chat("Hi.", "Hello."))
    told(bad, 400, "messages.1.: got role 'system'", [*chat("Hi."), {"role": "system", "content": "Be kind!"}])
    told(bad, 400, "messages.0.: got role 'wizard'", [{"role": "wizard", "content": "Hi."}])
    told(bad, 400, "messages.0.: got a content part of type 'image_url'", [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
    ])  # fmt: skip
    told(large, 413, "messages: got .* tokens and 190 of the answer, allowed 200 together", max_tokens=190)
    told(large, 413, "messages: got .* tokens, allowed 200 together", chat("Where did Ada go? " * 60))
    told(large, 413, "messages: got 1025, allowed 1024", chat(*["H"] * 1025))
    told(bad, 400, "messages.0.: has no content", [{"role": "system", "reasoning_content": "?"}, *chat("Hi.")])
    told(large, 413, "body: got .* bytes and maybe more, allowed 40,000", chat("Where did Ada go? " * 4000))
    with pytest.raises(openai.NotFoundError, match="model: got 'other', allowed 'tiny'"):
        client.chat.completions.create(model="other", messages=chat("Hi."))
    chosen = {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    with pytest.raises(bad, match="chat_template: a template is a program"):
        client.chat.completions.create(model=NAME, messages=chat("Hi."), extra_body=chosen)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="another", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="authorization: allowed the bearer token"):
            ask(stranger, chat("Hi."), "ada")
    for path in ("/v1/memories", "/metrics", "/docs", "/openapi.json"):
        assert http(address, "GET", path, key=None)[0] == 401
    assert http(address, "GET", "/openapi.json")[0] == 200
    for path in ("/docs", "/redoc"):  # the library's pages take scripts from other sites
        assert http(address, "GET", path)[0] == 404
    assert http(address, "GET", "/health", key=None)[0] == 200
    for data in (b"", b"{", b"[" * 30_000, b'{"model": "\xff"}'):
        status, body, _ = http(address, "POST", "/v1/chat/completions", data)
        assert status == 400 and json.loads(body)["error"]["message"].startswith("body: "), body
    assert http(address, "GET", "/v1/memories?limit=0")[0] == 400
    status, body, headers = http(address, "DELETE", "/health")
    assert status == 405 and headers["allow"] == "GET"
    long = json.dumps({"memory_id": "ada", "text": "Where did Ada go? " * 100}).encode()
    status, body, _ = http(address, "POST", "/v1/forget", long)
    assert status == 404  # nothing is there; one that is there:
    engine.bank.commit(["ada"], MemoryState.zeros(engine.model))
    status, body, _ = http(address, "POST", "/v1/forget", long)
    assert status == 413 and b"text: got" in body
    engine.bank.delete(["ada"])
    assert http(address, "GET", "/nowhere")[0] == 404
    assert len(engine.bank) == 0
    assert json.loads(http(address, "GET", "/v1/models")[1])["data"][0]["id"] == NAME


def test_without_a_token_no_page_of_another_site_is_answered(engine):
    with listening(engine) as address:
        body = json.dumps({"model": NAME, "memory_id": "ada", "messages": chat("Hi.")}).encode()
        port = address.rpartition(":")[2]
        for headers, status, said in (
            ({"Host": f"evil.example:{port}"}, 403, b"host: got 'evil.example"),
            ({"Host": f"127.0.0.1.evil.example:{port}"}, 403, b"host: got "),
            ({"Content-Type": "text/plain"}, 415, b"content-type: got 'text/plain', allowed application/json"),
            ({"Sec-Fetch-Site": "cross-site"}, 403, b"sec-fetch-site: got 'cross-site'"),
            ({"Sec-Fetch-Site": "same-site"}, 403, b"sec-fetch-site: got 'same-site'"),
            ({"Sec-Fetch-Site": "same-origin"}, 200, b'"choices"'),
            ({"Host": f"localhost:{port}"}, 200, b'"choices"'),
            ({"Host": f"[::1]:{port}", "Content-Type": "application/json; charset=utf-8"}, 200, b'"choices"'),
        ):
            request = urllib.request.Request(f"{address}/v1/chat/completions", body, method="POST")
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                request.add_header(name, value)
            try:
                with urllib.request.urlopen(request) as response:
                    found = response.status, response.read()
            except urllib.error.HTTPError as error:
                found = error.code, error.read()
            assert found[0] == status and said in found[1], (headers, found)
        # What changes something and is no plain form asks first (a preflight): nobody is told that they may.
        asks = {"Origin": "http://evil.example", "Access-Control-Request-Method": "DELETE"}
        request = urllib.request.Request(f"{address}/v1/memories/ada", method="OPTIONS", headers=asks)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 405
        assert not [name for name in refused.value.headers if name.lower().startswith("access-control")]


def test_chunked_bodies_are_counted_too(address):
    import http.client

    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", iter([b" " * 10_000] * 5), headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413 and b"allowed 40,000" in response.read()


def test_as_many_wait_as_may(engine, client):
    gate, began = threading.Event(), threading.Event()
    engine.call(lambda: (began.set(), gate.wait(20)), "gate")
    assert began.wait(20)
    threads = [threading.Thread(target=ask, args=(client, chat("Hi."), f"user-{n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    while len(engine.queue) < 8:
        threading.Event().wait(0.01)
    with pytest.raises(openai.RateLimitError, match="queue: 8 requests wait") as caught:
        ask(client, chat("Hi."), "late")
    assert caught.value.response.headers["retry-after"] == "1"
    gate.set()
    for thread in threads:
        thread.join()
    assert len(engine.bank) == 8 and "late" not in engine.bank


def test_an_error_in_the_model_is_told_and_the_next_is_answered(served, engine, client, caplog):
    model, _ = served
    original = model.generate

    def broken(*args, **kwargs):
        raise RuntimeError("secret of another's prompt")

    model.generate = broken
    try:
        with pytest.raises(openai.InternalServerError, match="server: RuntimeError; its log says more") as caught:
            ask(client, chat("Hi."), "ada")
    finally:
        model.generate = original
    assert "secret" not in str(caught.value) and "secret" not in caplog.text
    assert "a request has failed: RuntimeError" in caplog.text and "test_server.py" in caplog.text
    assert "ada" not in engine.bank
    assert ask(client, chat("Hi."), "ada").choices[0].message.content is not None
