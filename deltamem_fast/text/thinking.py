"""One answer as it comes: ``generate`` in a thread of its own, its tokens as text, thinking apart."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import nn
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .stops import overlap

THINK, END_THINK = "<think>", "</think>"


class Tokens(BaseStreamer):
    """Hands on what ``generate`` chooses, a token a row at a time; its first call is the prompt."""

    def __init__(self, say: Callable[[list[int]], None]):
        self._say = say
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._say(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def stream_tokens(model: nn.Module, arguments: dict[str, Any]) -> Iterator[int]:
    """The tokens that ``model.generate(**arguments)`` chooses for one row, each as soon as it is there.

    Closing the iterator stops the generation and waits for its end: nothing runs on behind its back.

    Raises:
        whatever generate raises.
    """
    found: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def stopped(input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), stopped])
    arguments = arguments | {"streamer": Tokens(found.put), "stopping_criteria": criteria}

    def run() -> None:
        try:
            model.generate(**arguments)
            found.put(None)
        except BaseException as error:  # told to who reads, in its own thread
            found.put(error)

    # The caller's context variables (a disabled memory, a record of gates) hold in the thread, too.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield from item
    finally:
        stop.set()
        thread.join()


class TextStream:
    """Tokens → text, thinking apart from the answer. White space around both is left out.

    A tokenizer that is not fast gives its text at the end.

    Attributes:
        answer, thinking: the text so far.
        ids: the tokens so far.
        thinks: the thinking has begun and not ended.
    """

    def __init__(self, tokenizer, header: str):
        """``header``: the text that the answer continues; it may have opened the thinking."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        self._decode = DecodeStream(skip_special_tokens=False)
        # Marks of thinking are read, whether they count as special tokens or not; other special tokens are no text.
        marks = {tokenizer.convert_tokens_to_ids(mark) for mark in (THINK, END_THINK)}
        self._silent = set(tokenizer.all_special_ids) - marks
        self.ids: list[int] = []
        self.answer = self.thinking = ""
        self._waiting = ""  # text that may be the beginning of a mark, or white space at the end
        self.thinks = header.rfind(THINK) > header.rfind(END_THINK)

    def add(self, token: int) -> Iterator[tuple[str, bool]]:
        """Text that has become certain by one more token: (piece, whether it is thinking)."""
        self.ids.append(token)
        if token not in self._silent and self._backend is not None:
            try:
                piece = self._decode.step(self._backend, token)
            except Exception:
                # Some byte sequences decode otherwise once more follows, and the stream gives up: from here on afresh.
                self._decode = DecodeStream(skip_special_tokens=False)
                piece = self._decode.step(self._backend, token)
            if piece:
                yield from self._split(piece)

    def end(self) -> Iterator[tuple[str, bool]]:
        """What waited for more that never came."""
        if self._backend is None:
            spoken = [token for token in self.ids if token not in self._silent]
            yield from self._split(self._tokenizer.decode(spoken, skip_special_tokens=False))
        rest = self._waiting.rstrip()
        self._waiting = ""
        yield from self._say(rest)

    def _split(self, piece: str) -> Iterator[tuple[str, bool]]:
        self._waiting += piece
        while True:
            # Thinking begins an answer or is none: "<think>" in the middle of a sentence is a word.
            mark = END_THINK if self.thinks else "" if self.answer else THINK
            place = self._waiting.find(mark) if mark else -1
            if place < 0 or (mark == THINK and self._waiting[:place].strip()):
                break
            before, self._waiting = self._waiting[:place], self._waiting[place + len(mark) :]
            yield from self._say(before.rstrip())
            self.thinks = not self.thinks
        certain = len(self._waiting) - overlap(self._waiting, mark)
        text = self._waiting[:certain]
        keep = len(text.rstrip())
        self._waiting = self._waiting[keep:]
        yield from self._say(text[:keep])

    def _say(self, text: str) -> Iterator[tuple[str, bool]]:
        kind = "thinking" if self.thinks else "answer"
        said = getattr(self, kind)
        text = text if said else text.lstrip()
        if text:
            setattr(self, kind, said + text)
            yield text, self.thinks
