"""The OpenAI-compatible server: a memory in ``vllm_xargs``, and what was written by the one route of ours."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from deltamem_fast import MemoryState
from deltamem_fast.vllm.given import MODE, STATE, arguments_of, read_arguments, salt_of
from tests.support import relative_error
from tests.vllm.engines import BLOCK, Expected, prompts

TOKENS = 20


@pytest.fixture(scope="module")
def server(qwen3, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = {"architectures": ["DeltaMemQwen3ForCausalLM"], "delta_mem_adapter": str(qwen3 / "adapter")}
    arguments = [
        "--model", str(qwen3), "--hf-overrides", json.dumps(overrides), "--skip-tokenizer-init", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "256", "--block-size", str(BLOCK), "--max-num-seqs", "4",
        "--host", "127.0.0.1", "--port", str(port), "--api-key", "secret",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "VLLM_PLUGINS": "deltamem_fast",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            stdout=out, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert run.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-4000:])
        yield address
    finally:
        run.terminate()
        run.wait(timeout=60)


def post(address: str, path: str, body: dict, key: str = "secret") -> dict:
    request = urllib.request.Request(
        address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def complete(address: str, qwen3, ids: list[int], arguments: dict | None = None) -> list[int]:
    body = {"model": str(qwen3), "prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    if arguments:
        body["vllm_xargs"] = arguments
        if (salt := salt_of(arguments)) is not None:
            body["cache_salt"] = salt
    return post(address, "/v1/completions", body)["choices"][0]["token_ids"]


def test_a_user_over_http(server, qwen3):
    expected, bare = Expected(qwen3), Expected(qwen3, bare=True)
    memory = MemoryState.zeros(expected.model)
    state = None
    for turn, ids in enumerate(prompts(3, seed=200, shared=BLOCK)):
        key = f"turn-{turn}"
        arguments = arguments_of(state, "write", key)
        assert complete(server, qwen3, ids, arguments) == expected(ids, TOKENS, memory)
        [found] = post(server, "/v1/delta_mem/take", {"keys": [key]})["states"]
        assert found["tokens"] == len(ids) + TOKENS - 1
        state = read_arguments({STATE: found[STATE]}, (3, 1, 8, 8)).state
        for place, layer in enumerate(memory):
            assert relative_error(torch.from_numpy(state[place])[None], memory[layer]) < 1e-4
        assert post(server, "/v1/delta_mem/take", {"keys": [key]}) == {"states": [None]}
        frozen = memory.read_only()
        assert complete(server, qwen3, ids, arguments_of(state, "read")) == expected(ids, TOKENS, frozen)
        assert complete(server, qwen3, ids, {MODE: "none"}) == bare(ids, TOKENS)
        assert complete(server, qwen3, ids) == expected(ids, TOKENS)


def test_mistakes_are_the_requests_own(server, qwen3):
    ids = prompts(1, seed=210)[0]
    for arguments, words in (
        ({MODE: "append"}, "delta_mem_mode: got 'append', allowed write, read, none"),
        (arguments_of(np.zeros((1, 1, 4, 4), np.float32)), "delta_mem_state: got 64 bytes, allowed 768"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            complete(server, qwen3, ids, arguments)
        assert error.value.code == 400 and words in error.value.read().decode()
    for body in ({}, {"keys": "turn"}, {"keys": [1]}):
        with pytest.raises(urllib.error.HTTPError) as error:
            post(server, "/v1/delta_mem/take", body)
        assert error.value.code == 400 and "keys: allowed a list" in error.value.read().decode()
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, "/v1/delta_mem/take", {"keys": []}, key="another")
    assert error.value.code == 401
    assert complete(server, qwen3, ids) == Expected(qwen3)(ids, TOKENS)
