"""``deltamem serve --engine vllm``: the same contract as over transformers, turn by turn, alone and beside others."""

import concurrent.futures
import contextlib
import threading

import openai
import pytest
import torch

from deltamem_fast import MemoryBank, MemoryState, patch_model
from deltamem_fast.serving.jobs import Limits
from deltamem_fast.serving.metrics import Metrics
from deltamem_fast.serving.rows import answer_rows, answer_rows_from
from tests.serving.serving_support import KEY, NAME, ask, chat, greedy, http, listening, row_of
from tests.support import relative_error
from tests.tokenizers_for_tests import chatml_tokenizer
from tests.vllm.engines import BLOCK, checkpoint

SETTINGS = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": BLOCK, "max_num_seqs": 4,
    "max_num_batched_tokens": 64,  # prompts come in parts
}  # fmt: skip
SAID = ("My dog is called Rex and my sister lives in Paris.", "Where did Ada go on Monday?", "The market.", "Ada?")


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    """A tiny Qwen3 with an adapter and a tokenizer that has a chat template."""
    special = {"eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    found = checkpoint(tmp_path_factory.mktemp("served"), **special)
    tokenizer.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def model(directory):
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    return patch_model(found, str(directory / "adapter"), backend="reference")


@pytest.fixture(scope="module")
def llm(directory):
    from deltamem_fast.vllm.serve import running

    settings = {"model": str(directory), **SETTINGS}
    settings["hf_overrides"] = {
        "architectures": ["DeltaMemQwen3ForCausalLM"], "delta_mem_adapter": str(directory / "adapter")
    }  # fmt: skip
    with running(settings) as (llm, loop):
        yield llm, loop


@contextlib.contextmanager
def served(llm, tokenizer, directory, path, **limits):
    """An engine over a bank, its address, and a client."""
    from deltamem_fast.vllm.engine import VllmEngine
    from deltamem_fast.vllm.offline import stand_in
    from deltamem_fast.vllm.serve import ends_of

    found, loop = llm
    with MemoryBank(path, stand_in(found.vllm_config)) as bank:
        ends = ends_of(str(directory), tokenizer)
        engine = VllmEngine(
            found, loop, tokenizer, ends, bank, stand_in(found.vllm_config), NAME, limits_of(limits), Metrics()
        )
        try:
            with listening(engine, KEY) as address:
                with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
                    yield engine, address, client
        finally:
            engine.close()


def limits_of(given) -> Limits:
    return Limits(**({"answer": 8, "waiting": 16, "rows": 4} | given))


@pytest.fixture
def service(llm, tokenizer, directory, tmp_path):
    with served(llm, tokenizer, directory, tmp_path / "users.bank") as found:
        yield found


class Replay:
    """A user's turns over transformers, one after another and alone."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.memory, self.known = MemoryState.zeros(model), False

    def turn(self, messages, most=8, write=True):
        row = row_of(self.model, self.tokenizer, messages, most)
        options = greedy(self.model, self.tokenizer)
        self.memory = answer_rows_from(self.model, [row], self.memory, self.known, options, write=write)
        self.known = self.known or write
        return row


def close(found, wanted) -> bool:
    return all(relative_error(found[i], wanted[i]) < 1e-4 for i in wanted)


@pytest.mark.parametrize("history", [False, True], ids=["new messages", "whole chats"])
def test_turns_are_those_over_transformers(service, model, tokenizer, history):
    engine, _, client = service
    replay, version, messages = Replay(model, tokenizer), 0, []
    for said in SAID:
        messages = [*(messages if history else ()), {"role": "user", "content": said}]
        row = replay.turn(messages)
        found = ask(client, messages, "ada")
        assert found.choices[0].message.content == row.answer and found.choices[0].finish_reason == row.finish
        assert found.usage.prompt_tokens == len(row.prompt) and found.usage.completion_tokens == row.tokens
        told = found.model_extra["memory"]
        assert told["loaded"] == version and told["version"] > version
        version = told["version"]
        kept = engine.bank.gather(["ada"])
        assert kept.bank_rows[0][1] == version and close(kept, replay.memory)
        messages = [*messages, {"role": "assistant", "content": row.answer}]
    read = ask(client, chat("Ada?"), "ada", "read")
    assert read.choices[0].message.content == replay.turn(chat("Ada?"), write=False).answer
    assert read.model_extra["memory"] == {"id": "ada", "mode": "read", "loaded": version, "version": version}
    bare = row_of(model, tokenizer, chat("Ada?"), 8)
    answer_rows(model, [bare], greedy(model, tokenizer))
    assert ask(client, chat("Ada?"), "ada", "none").choices[0].message.content == bare.answer
    alone = Replay(model, tokenizer).turn(chat("Ada?"))
    assert ask(client, chat("Ada?")).choices[0].message.content == alone.answer
    assert [entry.id for entry in engine.bank.list()] == ["ada"]
    assert engine.bank.gather(["ada"]).bank_rows[0][1] == version


def test_a_turn_moves_a_memory_as_far_as_it_is_trusted(service, model, tokenizer):
    engine, _, client = service
    replay = Replay(model, tokenizer)
    replay.turn(chat(SAID[0]))
    ask(client, chat(SAID[0]), "ada")
    before = replay.memory
    replay.turn(chat(SAID[1]))
    ask(client, chat(SAID[1]), "ada", trust=0.25)
    kept = engine.bank.gather(["ada"])
    assert all(relative_error(kept[i], torch.lerp(before[i], replay.memory[i], 0.25)) < 1e-4 for i in kept)


def test_many_users_at_once_and_one_memorys_requests_in_order(service, model, tokenizer):
    engine, _, client = service
    users = [f"user-{n}" for n in range(8)]
    found = {}

    def talk(name):
        found[name] = [ask(client, chat(said), name) for said in SAID]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(talk, users))
        both = list(pool.map(lambda said: ask(client, chat(said), "shared"), SAID[:3]))
    for name in users:
        replay = Replay(model, tokenizer)
        assert [replay.turn(chat(said)).answer for said in SAID] == [f.choices[0].message.content for f in found[name]]
        assert close(engine.bank.gather([name]), replay.memory)
    told = sorted((f.model_extra["memory"] for f in both), key=lambda memory: memory["version"])
    assert told[0]["loaded"] == 0 and [m["loaded"] for m in told[1:]] == [m["version"] for m in told[:-1]]


def test_a_stream_stops_and_conflicts_and_hang_ups_leave_nothing(service, model, tokenizer):
    engine, address, client = service
    row = Replay(model, tokenizer).turn(chat(SAID[0]), 24)
    stop = row.answer[4:6]
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in ask(client, chat(SAID[0]), "ada", stream=True, stop=[stop], max_tokens=24)
    ]
    assert "".join(pieces) == row.answer[: row.answer.index(stop)]
    replay = Replay(model, tokenizer)
    cut = row_of(model, tokenizer, chat(SAID[0]), 24, stops=(stop,))
    replay.memory = answer_rows_from(
        model, [cut], replay.memory, False, greedy(model, tokenizer), write=True
    )  # fmt: skip
    before = engine.bank.gather(["ada"])
    assert close(before, replay.memory)
    original = engine.chat

    def move_on(request, say, *more):
        return original(request, lambda *piece: (engine.bank.commit(["ada"], before), say(*piece)), *more)

    engine.chat = move_on
    with pytest.raises(openai.ConflictError, match="moved on"):
        ask(client, chat(SAID[1]), "ada")
    engine.chat = original
    assert engine.bank.gather(["ada"]).bank_rows == before.bank_rows
    stream = ask(client, chat(SAID[1]), "ada", stream=True, max_tokens=100)
    next(iter(stream))
    stream.response.close()
    threading.Event().wait(0.5)
    assert ask(client, chat(SAID[2]), "ada").model_extra["memory"]["loaded"] == before.bank_rows[0][1]
    status, body, _ = http(address, "POST", "/v1/forget", b'{"memory_id": "ada", "text": "Rex."}')
    assert status == 501 and b"not supported by vLLM's engine" in body
    status, file, _ = http(address, "GET", "/v1/memories/ada")
    assert status == 200 and http(address, "PUT", "/v1/memories/copy", file)[0] == 200
    assert http(address, "DELETE", "/v1/memories/ada")[0] == 200 and "ada" not in engine.bank


def test_as_many_wait_as_may_and_mistakes_are_named(llm, tokenizer, directory, tmp_path):
    with served(llm, tokenizer, directory, tmp_path / "users.bank", waiting=1, rows=1) as (engine, _, client):
        gate = threading.Event()
        calls = [engine.call(lambda: gate.wait(20), name) for name in ("a", "b")]
        with pytest.raises(openai.RateLimitError, match="queue: 2 requests wait"):
            ask(client, chat("Hi."), "ada")
        gate.set()
        assert [call.result(20) for call in calls] == [True, True]
        with pytest.raises(openai.APIStatusError, match="allowed 256 together"):
            ask(client, chat("Where did Ada go? " * 60), "ada")
        with pytest.raises(openai.BadRequestError, match="memory: got 'both'"):
            ask(client, chat("Hi."), "ada", "both")
        assert len(engine.bank) == 0
        assert ask(client, chat("Hi."), "ada").model_extra["memory"]["loaded"] == 0


def test_engine_arguments_are_json_and_not_ours():
    from deltamem_fast.errors import ArgumentError
    from deltamem_fast.vllm.serve import engine_arguments

    assert engine_arguments(None) == {} and engine_arguments('{"a": 1}') == {"a": 1}
    for text, said in (("{", "allowed a JSON object"), ("[]", "allowed a JSON object"), ('{"model": ""}', "got model")):
        with pytest.raises(ArgumentError, match=f"--engine-args: .*{said}"):
            engine_arguments(text)
