"""What a request may have, field by field; nothing is silently left out."""

import json
import re

import pytest
from pydantic import ValidationError

from deltamem_fast.serving.contract import ChatRequest, in_words

GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": None}, "model: got None, allowed: input should be a valid string"),
        ({"messages": []}, "messages: got .*, allowed: list should have at least 1 item"),
        ({"messages": "Hi"}, "messages: got 'Hi', allowed: input should be a valid list"),
        ({"memory": "both"}, "memory: got 'both', allowed: input should be 'write', 'read' or 'none'"),
        ({"trust": 1.5}, "trust: got 1.5, allowed: input should be less than or equal to 1"),
        ({"trust": "0.5"}, "trust: got '0.5'"),
        ({"trust": True}, "trust: got True"),
        ({"trust": 0.5, "memory": "read"}, "trust: got it with memory 'read', allowed with 'write'"),
        ({"memory_id": 7}, "memory_id: got 7, allowed: input should be a valid string"),
        ({"max_tokens": 0}, "max_tokens: got 0, allowed: input should be greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens: got True"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"n": 2}, "n: got 2, allowed: input should be 1"),
        ({"stop": []}, "stop: got 0 texts, allowed 1 to 4"),
        ({"stop": ["a", ""]}, "stop: got an empty text"),
        ({"stream_options": {"include_usage": True}}, "stream_options: got it without stream"),
        ({"tools": []}, r"tools: got \[\], which is not supported here; leave it out"),
        ({"logprobs": True}, "logprobs: got True"),
        ({"presence_penalty": 0.5}, "presence_penalty: got 0.5"),
    ],
)
def test_what_is_wrong_is_named(more, said):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(GOOD | more)
    assert re.search(said, in_words(caught.value)), in_words(caught.value)


def test_what_is_missing_is_named():
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": "tiny"})
    assert in_words(caught.value) == "messages: not given, and it is needed"
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json("[1]")
    assert in_words(caught.value).startswith("body: got [1], allowed: ")


def test_how_a_token_is_chosen():
    def sampling(**more):
        return ChatRequest.model_validate(GOOD | more).sampling

    assert sampling() == sampling(temperature=0) == sampling(temperature=0, top_p=0.5) == {"do_sample": False}
    assert sampling(temperature=1e-40) == {"do_sample": False}  # what it would divide by overflows
    sampled = {"do_sample": True, "top_k": 0, "remove_invalid_values": True}
    assert sampling(temperature=0.7) == sampled | {"temperature": 0.7, "top_p": 1.0}
    assert sampling(top_p=0.5) == sampled | {"temperature": 1.0, "top_p": 0.5}
    asked = ChatRequest.model_validate(GOOD | {"max_tokens": 5, "max_completion_tokens": 7, "stop": "end"})
    assert asked.limit == 7 and asked.stops == ("end",)
    ours = {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "user": "u", "store": False}
    assert ChatRequest.model_validate_json(json.dumps(GOOD | ours)).limit is None
