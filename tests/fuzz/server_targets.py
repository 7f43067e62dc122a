"""Targets behind HTTP: a request as a server hands it over, to every route."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from concurrent.futures import Future
from typing import Any

from files_targets import memory_file
from mutations import as_text
from places import Target, folder, model, tokenizer
from text_targets import requests

from deltamem_fast import MemoryBank
from deltamem_fast.serving.app import make_app
from deltamem_fast.serving.jobs import Answered, Intake, Limits
from deltamem_fast.serving.metrics import Metrics

KEY = "a-key"


class _Engine:
    """Answers each chat with one word, when its request is sound; memories lie in a bank."""

    name, waiting, sound = "tiny", 0, True

    def __init__(self) -> None:
        self.limits = Limits(body=100_000)
        self.metrics = Metrics()
        self.bank = MemoryBank(folder() / "served.bank", model(), durable=False)
        self._intake = Intake(tokenizer(), "token", len(tokenizer()), self.limits, 4096)

    def chat(self, request: Any, say: Any, peer: str, gone: threading.Event) -> Any:
        job = self._intake.job(request, say, peer, gone)
        say("Yes.", False)
        job.done.set_result(Answered({"role": "assistant", "content": "Yes."}, "stop", len(job.prompt), 1, 0, 1))
        return job

    def call(self, call: Any, memory_id: str) -> Future:
        done: Future = Future()
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)
        return done

    def forget(self, memory_id: str, text: str, strength: float | None) -> tuple[int, int]:
        self._intake.check_text(text)
        return 1, 1


@functools.cache
def _engine() -> _Engine:
    return _Engine()


@functools.cache
def _app(key: str | None) -> tuple[Any, asyncio.AbstractEventLoop]:
    return make_app(_engine(), key), asyncio.new_event_loop()


def _ask(data: bytes) -> None:
    """Method, path, query and headers in the first line, as a list; then the body. No answer is a 500."""
    head, _, body = data.partition(b"\n")
    try:
        parts = [*json.loads(head)][:4]
    except (ValueError, TypeError, RecursionError):
        parts = []
    method, path, query, headers = [*map(_said, parts[:3]), "GET", "/health", ""][:3] + [parts[3:]]
    pairs = [
        pair for pair in (headers[0] if headers and isinstance(headers[0], list) else ()) if isinstance(pair, list)
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
        "method": method, "path": path, "raw_path": path.encode("utf-8", "replace"), "root_path": "",
        "query_string": query.encode("utf-8", "replace"), "server": ("127.0.0.1", 80),
        "headers": [(b"authorization", b"Bearer " + KEY.encode()),
                    *((_field(pair[0]).lower(), _field(pair[-1])) for pair in pairs if pair)],
    }  # fmt: skip
    sent: list[dict[str, Any]] = []
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    # With a name of a host the server has no token, and answers its own machine alone.
    app, loop = _app(None if any(name == b"host" for name, _ in scope["headers"]) else KEY)
    loop.run_until_complete(app(scope, receive, send))
    status = sent[0]["status"]
    assert 200 <= status < 500 or status == 503, (status, sent[-1])
    told = b"".join(message.get("body", b"") for message in sent[1:])
    assert status < 400 or len(told) < 4000, "an error of more than 4,000 bytes"
    if status >= 400:
        assert json.loads(told)["error"]["message"]


def _field(value: Any) -> bytes:
    return _said(value).encode("latin-1", "replace")


def _said(value: Any) -> str:
    return as_text(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else str(value)[:200]


def _requests() -> list[bytes]:
    kind = [["content-type", "application/json"]]

    def one(method: str, path: str, body: bytes = b"", query: str = "") -> bytes:
        return json.dumps([method, path, query, kind]).encode() + b"\n" + body

    chat, stream = (
        "/v1/chat/completions",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": true}',
    )
    return [
        json.dumps(["POST", chat, "", [*kind, ["host", "[::1]:80"]]]).encode() + b"\n" + stream,
        *(one("POST", chat, body) for body in (*requests(), stream)), one("GET", "/v1/models"), one("GET", "/metrics"),
        one("PUT", "/v1/memories/ada", memory_file(1), "overwrite=true"), one("GET", "/v1/memories/ada"),
        one("GET", "/v1/memories", query="prefix=a&limit=3&offset=0"), one("DELETE", "/v1/memories/ada"),
        one("POST", "/v1/forget", b'{"memory_id": "ada", "text": "Rex", "strength": 1}'), one("GET", "/health"),
    ]  # fmt: skip


TARGETS = [Target("http", "deltamem_fast.serving.app:make_app", _ask, _requests, "head", 400)]
