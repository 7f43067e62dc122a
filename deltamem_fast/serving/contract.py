"""What is asked and answered over HTTP: one contract, whatever engine answers. Needs pydantic alone, no torch.

A chat completion as OpenAI's clients send it, and three fields more: ``memory_id``, whose memory is read and written,
``memory``, what is done with it, and ``trust``, how far.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..arguments import shown
from ..display import shortened

_COLDEST = 0.01  # below it, sampling is greedy but for what overflows


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream has besides the answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """A request of ``POST /v1/chat/completions``. What is not here is refused, so that nothing is silently left out.

    Attributes:
        messages: the chat as it is to be in sight; the last one is of role ``user`` or ``tool``.
        memory_id: whose memory; None: an empty one, which ends with the request.
        memory: ``write``: it is read, and what is new in the request and the answer are written. ``read``: it is read,
            and stays as it is. ``none``: the bare model answers.
        trust: the memory goes this share of the way to what the turn makes of it, 0 to 1; None: as far as the server
            lets a turn go, which is never more. At 0 nothing is kept, as with ``read``.
        max_tokens, max_completion_tokens: of the answer, thinking included; the newer name counts.
        temperature, top_p: greedy unless one of them is given, and the temperature is 0.01 or more.
        seed: of sampling; such a request is answered in no batch.
        chat_template_kwargs: arguments of the chat template, such as ``enable_thinking``.
        n, user, and what follows: taken, as clients send them, where they ask for nothing that is not done.
    """

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    memory_id: str | None = None
    memory: Literal["write", "read", "none"] = "write"
    trust: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, strict=False)
    top_p: float | None = Field(None, gt=0, le=1, strict=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    n: Literal[1] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: got it without stream, allowed with stream true")
        if self.stop is not None and not 1 <= len(self.stops) <= 4:
            raise ValueError(f"stop: got {len(self.stops)} texts, allowed 1 to 4")
        if self.trust is not None and self.memory != "write":
            raise ValueError(f"trust: got it with memory {self.memory!r}, allowed with 'write'")
        if not all(self.stops):
            raise ValueError("stop: got an empty text, allowed texts that are not empty")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most, as far as the request says."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of ``generate``: how a token is chosen."""
        unasked = self.temperature is None and self.top_p is None
        if unasked or (self.temperature is not None and self.temperature < _COLDEST):
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": 0,  # nor the model's own cut
            "remove_invalid_values": True,  # a memory can be of any finite numbers
        }


class ForgetRequest(_Strict):
    """A request of ``POST /v1/forget``: erase from a memory what a text has written."""

    memory_id: str
    text: str
    strength: float | None = Field(None, ge=0, strict=False)


def in_words(error: ValidationError) -> str:
    """The first thing that is wrong with a request: the field, what was given, what is allowed."""
    first = error.errors(include_url=False)[0]
    said = first["msg"]
    if first["type"] == "value_error":
        return said.removeprefix("Value error, ")
    field = shortened(".".join(map(str, first["loc"])), 80) or "body"
    if first["type"] == "extra_forbidden":
        return f"{field}: got {shown(first['input'])}, which is not supported here; leave it out"
    if first["type"] == "missing":
        return f"{field}: not given, and it is needed"
    return f"{field}: got {shown(first['input'])}, allowed: {said[:1].lower()}{said[1:]}"


def memory_of(request: ChatRequest, loaded: int, version: int) -> dict[str, Any] | None:
    """What an answer says of the memory that it was given with.

    Args:
        loaded: the version that was read; 0: there was none yet.
        version: the one that is there now.
    """
    if request.memory_id is None:
        return None
    return {"id": request.memory_id, "mode": request.memory, "loaded": loaded, "version": version}


class Reply:
    """The bodies of one answer: a whole one, or the chunks of a stream."""

    def __init__(self, model: str):
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, message: dict[str, Any], finish: str, usage: dict[str, int], memory: Any) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return self._body("chat.completion", [choice]) | {"usage": usage, "memory": memory}

    def chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        """A piece of a stream."""
        return self._body("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": finish}]) | more

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece of a stream that was to say what it took."""
        return self._body("chat.completion.chunk", []) | {"usage": usage}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": kind, "choices": choices}


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    """Tokens of a request's prompt and answer, as OpenAI's clients read them."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


_KINDS = {401: "authentication_error", 409: "memory_conflict", 429: "rate_limit_error"}


def error_body(status: int, message: str) -> dict[str, Any]:
    """The body of an error, as OpenAI's clients read it."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
