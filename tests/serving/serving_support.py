"""Requests, rows and servers for the tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request

import uvicorn

from deltamem_fast import MemoryBank, patch_model
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.serving.app import make_app
from deltamem_fast.serving.engine import Engine
from deltamem_fast.serving.jobs import Limits
from deltamem_fast.serving.metrics import Metrics
from deltamem_fast.serving.prompts import rendered
from deltamem_fast.serving.rows import Row
from deltamem_fast.text.answering import answer_options

NAME = "tiny"
KEY = "a-token-for-tests"


def served_model(strategy: str = "tsw", family: str = "qwen3", **changes):
    """A random model with a loud adapter, and its tokenizer."""
    from session_support import CONFIGS
    from support import loud_adapter, tiny_model
    from tokenizers_for_tests import chatml_tokenizer

    tokenizer = chatml_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(family, vocab_size=len(tokenizer), num_hidden_layers=2, **(special | changes))
    return loud_adapter(patch_model(model, CONFIGS[strategy], backend="reference"), scale=0.5), tokenizer


def chat(*said: str, system: str | None = None) -> list[dict]:
    """Messages: a user and an assistant by turns."""
    front = [] if system is None else [{"role": "system", "content": system}]
    return front + [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]


def row_of(model, tokenizer, messages, most: int = 6, **more) -> Row:
    """A row that answers ``messages``."""
    prompt = rendered(tokenizer, identity_of(model).config.memory_write_granularity, messages, {})
    return Row(prompt, most, **more)


def greedy(model, tokenizer) -> dict:
    """Options of ``generate``."""
    return answer_options(model, tokenizer, {"do_sample": False})


@contextlib.contextmanager
def engine_of(model, tokenizer, path, **limits):
    """An engine over a bank at ``path``."""
    with MemoryBank(path, model) as bank:
        engine = Engine(model, tokenizer, bank, NAME, Limits(**limits), Metrics())
        try:
            yield engine
        finally:
            engine.close()


@contextlib.contextmanager
def listening(engine: Engine, key: str | None = None):
    """The address of a server around an engine, on loopback."""
    server = uvicorn.Server(uvicorn.Config(make_app(engine, key), log_level="error", access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as found:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{found.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def ask(client, messages, memory_id=None, memory="write", trust=None, **more):
    body = {"memory": memory} | ({} if memory_id is None else {"memory_id": memory_id})
    body |= {} if trust is None else {"trust": trust}
    return client.chat.completions.create(model=NAME, messages=messages, extra_body=body, **more)


def http(address, method, path, data=None, key=KEY):
    """(status, body, headers) of a request."""
    request = urllib.request.Request(address + path, data, method=method)
    request.add_header("Content-Type", "application/json")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def together(engine: Engine, calls: dict) -> dict:
    """What each call returns or raises, by its name; all have come before the worker takes one."""
    gate, began, found = threading.Event(), threading.Event(), {}
    engine.call(lambda: (began.set(), gate.wait(20)), "gate")
    assert began.wait(20)

    def run(name, call):
        try:
            found[name] = call()
        except Exception as error:
            found[name] = error

    threads = [threading.Thread(target=run, args=item) for item in calls.items()]
    for thread in threads:
        thread.start()
    while len(engine.queue) < len(calls):
        time.sleep(0.01)
    gate.set()
    for thread in threads:
        thread.join()
    return found
