"""Targets that read what is said: requests, chats, texts, lines that are typed, arguments of commands."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from pathlib import Path

from chat_support import ListScreen
from mutations import as_text
from places import Target, adapter_bits, model, tokenizer, whole_text, written
from pydantic import ValidationError
from tokenizers_for_tests import mode_tokenizer

from deltamem_fast import DeltaMemConfig, MemorySession, segment_ids_from_messages
from deltamem_fast.adapter.fingerprints import public_label
from deltamem_fast.chat.commands import read_text, run_command
from deltamem_fast.chat.conversation import Chat
from deltamem_fast.chat.options import OPTIONS, read_limit, read_option
from deltamem_fast.cli.eval import _task, _template
from deltamem_fast.cli.given import given_text
from deltamem_fast.errors import DeltaMemError
from deltamem_fast.eval.harness_options import checked_telling
from deltamem_fast.serving.contract import ChatRequest, ForgetRequest, error_body, in_words
from deltamem_fast.serving.jobs import Intake, Limits
from deltamem_fast.storage.bank_ids import check_ids
from deltamem_fast.storage.files import as_path, parse_json
from deltamem_fast.text.cutting import pieces_of
from deltamem_fast.text.encode import as_chat, encode_text
from deltamem_fast.text.messages import plain_messages
from deltamem_fast.text.segments import sentence_spans
from deltamem_fast.text.stops import StoppedText
from deltamem_fast.text.thinking import TextStream
from deltamem_fast.vllm.given import FIRST, KEY, MODE, STATE, check_arguments, read_arguments, salt_of

USER, SAID = {"role": "user", "content": "Where is Rex? At home."}, {"role": "assistant", "content": "I see. So."}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes.", "reasoning_content": "Hm."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a. b"}, {"type": "text", "text": "c"}]}
CHATS = [
    [{"role": "system", "content": "Be brief."}, USER, SAID, PARTS],
    [USER, THOUGHT, USER, CALL, {"role": "tool", "content": "5"}],
]

# --- requests


def _request(data: bytes) -> None:
    """A body as the server takes it: a job, or an error that it can tell."""
    try:
        request = ChatRequest.model_validate_json(data)
    except ValidationError as error:
        _told(400, in_words(error))
        return
    assert all(math.isfinite(value) for value in request.sampling.values()), request.sampling
    try:
        job = _intake().job(request, lambda piece, thinking: None, "here")
    except DeltaMemError as error:
        _told(400, str(error))
        raise
    assert len(job.prompt) + job.row.most <= 4096 and job.prompt.whole.ids
    assert max(job.prompt.whole.ids) < len(tokenizer())


def _told(status: int, message: str) -> None:
    """As the server says it: JSON in UTF-8."""
    body = json.dumps(error_body(status, message), ensure_ascii=False, allow_nan=False).encode("utf-8")
    assert len(body) < 4000, "an error of more than 4,000 bytes"


@functools.cache
def _intake() -> Intake:
    return Intake(tokenizer(), "message_mean", len(tokenizer()), Limits(), 4096)


def requests() -> list[bytes]:
    """Chat completions that are sound."""
    common = {
        "model": "tiny",
        "memory_id": "ada",
        "memory": "write",
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["x"],
    }
    more = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    return [json.dumps(common | {"messages": CHATS[0]} | more).encode(),
            json.dumps({"model": "tiny", "messages": CHATS[1], "top_p": 1, "seed": 3, "n": 1}).encode()]  # fmt: skip


def _forget(data: bytes) -> None:
    try:
        request = ForgetRequest.model_validate_json(data)
    except ValidationError as error:
        _told(400, in_words(error))
        return
    check_ids([request.memory_id], "memory_id")


def _given(data: bytes) -> None:
    """A memory that a request to vLLM brings along."""
    arguments = parse_json(data, "extra_args")
    shapes = (None, (1, 1, 2, 2))
    errors = []
    for shape in shapes:
        for read in (check_arguments, read_arguments):
            try:
                found = read(arguments, shape)
            except DeltaMemError as error:
                errors.append(error)
                continue
            if found is not None and found.state is not None:
                assert found.state.dtype == "float32" and all(map(math.isfinite, found.state.ravel().tolist()))
            salt_of(arguments)
    if errors:
        raise errors[0]


def _arguments() -> list[bytes]:
    written = {MODE: "write", STATE: "AAAAAAAAgD8AAAAAAACAPw==", KEY: "k", FIRST: 2}
    return [json.dumps(written).encode(), json.dumps({MODE: "read", STATE: "AACAPw=="}).encode(), b"{}"]


# --- chats and texts


def _segments(data: bytes) -> None:
    messages = parse_json(b'{"messages": ' + data + b"}", "chat")["messages"]
    errors = []
    for one in (tokenizer(), mode_tokenizer()):
        for granularity in ("message", "sentence"):
            try:
                ids, segments = segment_ids_from_messages(one, messages, granularity)
            except DeltaMemError as error:
                errors.append(error)
                continue
            found = sorted(set(segments[0].tolist()) - {-1})
            assert ids.shape == segments.shape and found == list(range(len(found)))
    if errors:
        raise errors[0]


def _messages(data: bytes) -> None:
    """Messages, and what they are as tokens for adapters of all kinds."""
    messages = parse_json(b'{"messages": ' + data + b"}", "chat")["messages"]
    whole_text(*(message.get("content") or "" for message in plain_messages(messages)))
    as_chat(tokenizer(), messages)
    for config in (DeltaMemConfig.tsw(), DeltaMemConfig.ssw("sentence_mean")):
        ids, segments = encode_text(tokenizer(), messages, config, "text")
        assert segments is None or ids.shape == segments.shape


def _chats() -> list[bytes]:
    return [json.dumps(chat).encode() for chat in CHATS]


def _cut(data: bytes) -> None:
    """The pieces of a text are its words, in order, and each fits."""
    text = as_text(data)[:400].encode("utf-8", "replace").decode()

    def count(texts: list[str]) -> list[int]:
        return [len(tokenizer()(one, add_special_tokens=False)["input_ids"]) for one in texts]

    def encode(text, name: str) -> list[int]:
        whole = (
            text if isinstance(text, str) else "".join(f"<|im_start|>{one['role']}\n{one['content']}" for one in text)
        )
        return tokenizer()(whole, add_special_tokens=False)["input_ids"]

    for given in (text, [{"role": "user", "content": text}, SAID]):
        pieces = pieces_of(given, 24, count, encode)
        assert all(len(found) <= 24 for _, found in pieces)
        if isinstance(given, str):
            assert "".join("".join(piece.split()) for piece, _ in pieces) == "".join(text.split())


def _sentences(data: bytes) -> None:
    text = as_text(data)
    spans = sentence_spans(text)
    assert "".join(text[start:end] for start, end in spans) == text and all(start < end for start, end in spans)
    assert isinstance(public_label(text), str)


def _stream(data: bytes) -> None:
    """Tokens as they may come: two bytes each."""
    ids = [int.from_bytes(data[n : n + 2], "big") % len(tokenizer()) for n in range(0, min(len(data), 600) - 1, 2)]
    for header in ("", "<|im_start|>assistant\n<think>\n"):
        stream, said = TextStream(tokenizer(), header), []
        for token in ids:
            said += stream.add(token)
        said += stream.end()
        assert "".join(piece for piece, thinking in said if not thinking) == stream.answer
        assert "".join(piece for piece, thinking in said if thinking) == stream.thinking
        assert stream.ids == ids


def _tokens() -> list[bytes]:
    texts = ("<think>Hm.</think>Yes, ç and 日本.", "Yes. <think> no", "\n\n</think> é")
    return [b"".join(id.to_bytes(2, "big") for id in tokenizer()(text)["input_ids"]) for text in texts]


def _stop(data: bytes) -> None:
    """Texts that end an answer in the first line, a byte a length; the answer is cut where the first of them is."""
    first, _, rest = as_text(data).partition("\n")
    stops = [stop for stop in first.split("|") if stop][:4] or ["x"]
    places = [place for stop in stops if (place := rest.find(stop)) >= 0]
    for size in (1, 3, 1000):
        stopped = StoppedText(stops)
        found = "".join(stopped.add(rest[n : n + size]) for n in range(0, len(rest), size)) + stopped.rest()
        assert found == (rest[: min(places)] if size == 1000 and places and len(rest) <= 1000 else found)
        assert rest.startswith(found) and stopped.found == bool(places)
        assert not any(stop in found for stop in stops)


# --- what is typed


@functools.cache
def _chat() -> Chat:
    options = {"do_sample": False, "max_new_tokens": 2}
    session = MemorySession(model(), tokenizer(), context_turns=2, generation=options)
    session.answer("My dog is called Rex.")
    return Chat(session, ListScreen())


def _command(data: bytes) -> None:
    """A line that begins with a slash: it is done, or told why not, and then the chat is as it was."""
    line = "/" + as_text(data)[:200].encode("utf-8", "replace").decode().strip().lstrip("/")
    name, _, rest = line[1:].partition(" ")
    chat = _chat()
    if name in ("save", "load", "ingest", "quit"):  # these write where they are told to: see the target "path"
        rest = "nothing-there/" + "".join(c for c in rest if c.isalnum())
        line = f"/{name} {rest}" if name in ("load", "ingest") else "/help"
    weights, messages = adapter_bits(), chat.session.messages
    state = {i: layer.numpy().tobytes() for i, layer in chat.session.memory.items()}
    chat.screen.take()
    try:
        run_command(chat, line)
    except DeltaMemError:
        assert chat.session.messages == messages
        assert {i: layer.numpy().tobytes() for i, layer in chat.session.memory.items()} == state
        raise
    finally:
        assert adapter_bits() == weights
    if name in ("set", "context", "off"):
        chat.session.generation, chat.session.remembers = {"do_sample": False, "max_new_tokens": 2}, True


def _commands() -> list[bytes]:
    lines = ("help", "memory all", "ask What is it?", "revise It is 5.", "forget --messages Rex", "context 3", "undo",
             "context tokens 99", "context all", "off", "on", "set top_p 0.5", "set seed 3", "set", "ingest x",
             "memory", "nope")  # fmt: skip
    return [line.encode() for line in lines]


def _typed(data: bytes) -> None:
    """Arguments of commands that are read as numbers, JSON, a task, ids."""
    text = as_text(data)
    errors = []
    calls = [functools.partial(read_option, name, text) for name in OPTIONS]
    calls += [lambda: read_limit(text, "/context"), lambda: _template(text), lambda: _task(text)]
    calls += [lambda: check_ids(text.split("\n")), lambda: checked_telling(text, text, text, None)]
    for call in calls:
        try:
            call()
        except DeltaMemError as error:
            errors.append(error)
    if len(errors) == len(calls):
        raise errors[0]


def _path(data: bytes) -> None:
    """A path that is given: looked for, or refused."""
    text = as_text(data)
    found = as_path(text, "path")
    assert isinstance(found, Path)
    os.fspath(found)


def _text_file(data: bytes) -> None:
    path = written(data, "given.txt")
    errors = []
    for call in (lambda: given_text(argparse.Namespace(text=None, text_file=str(path))), lambda: read_text(str(path)),
                 lambda: given_text(argparse.Namespace(text=as_text(data), text_file=None))):  # fmt: skip
        try:
            whole_text(call())
        except DeltaMemError as error:
            errors.append(error)
    if errors:
        raise errors[0]


TARGETS = [
    Target("chat-request", "deltamem_fast.serving.contract:ChatRequest", _request, requests, "json", 600),
    Target("forget-request", "deltamem_fast.serving.contract:ForgetRequest", _forget,
           lambda: [b'{"memory_id": "ada", "text": "Rex", "strength": 1.5}'], "json", 200),
    Target("vllm-arguments", "deltamem_fast.vllm.given:read_arguments", _given, _arguments, "json", 300),
    Target("segments", "deltamem_fast.text.segments:segment_ids_from_messages", _segments, _chats, "json", 300),
    Target("messages", "deltamem_fast.text.messages:plain_messages", _messages, _chats, "json", 300),
    Target("pieces", "deltamem_fast.text.cutting:pieces_of", _cut,
           lambda: [b"One sentence. Two, three! " * 8, "日本語。です、" .encode() * 9, b"a" * 90], "text", 200),
    Target("sentences", "deltamem_fast.text.segments:sentence_spans", _sentences,
           lambda: [b'He said: "No." So... what?\n\nNew.', "はい。『はい』。だめ".encode(),
                    b"../x (llama, 2 layers, hidden 64)"], "text", 400),
    Target("stream", "deltamem_fast.text.thinking:TextStream", _stream, _tokens, "bytes"),
    Target("stops", "deltamem_fast.text.stops:StoppedText", _stop, lambda: [b"ab|abc|\n\nxxababcx", b"aa\naaab"],
           "text"),
    Target("command", "deltamem_fast.chat.commands:run_command", _command, _commands, "text"),
    Target("typed", "deltamem_fast.chat.options:read_option", _typed,
           lambda: [b"0.5", b"12", b'{"a": 1}', b"locomo=x.json", b"1e9", b"all"], "text", 300),
    Target("path", "deltamem_fast.storage.files:as_path", _path, lambda: [b"a/b", b"~/x", b"~root/.."], "text", 200),
    Target("text-file", "deltamem_fast.cli.given:given_text", _text_file, lambda: [b"Hello.\n", "é日".encode()],
           "bytes"),
]  # fmt: skip
