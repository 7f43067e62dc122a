"""Chats for the tests: on the shipped backbone, on tiny models that say what they are told to, on a screen of lists."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch
from support import Says, loud_adapter, tiny_model
from tokenizers_for_tests import thinking_tokenizer
from transformers import LogitsProcessorList

from deltamem_fast import MemorySession, patch_model, save_adapter, unpatch_model
from deltamem_fast.chat.commands import take_line
from deltamem_fast.chat.conversation import Chat
from deltamem_fast.recall.weights import find_weights, load_backbone

TOLD, ASKED = "The code of Corpus is 42.", "What is the code of Corpus?"


class ListScreen:
    """Keeps what a chat shows: ``shown`` is a list of (kind, text)."""

    columns, style = 100, "ascii"

    def __init__(self):
        self.shown: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def answering(self):
        self.shown.append(("answer", ""))
        yield self

    def piece(self, text):
        kind, before = self.shown.pop()
        assert kind == "answer"
        self.shown.append((kind, before + text))

    def thinking(self, text):
        pass

    def say(self, text):
        self.shown.append(("say", text))

    def said(self, role, text):
        self.shown.append((role, text))

    def table(self, headings, rows, left=()):
        assert all(len(row) == len(headings) for row in rows)
        self.shown.append(("table", "\n".join("|".join(row) for row in rows)))

    def picture(self, lines):
        self.shown.append(("picture", "\n".join(lines)))

    def hint(self, text):
        self.shown.append(("hint", text))

    def error(self, text):
        self.shown.append(("error", text))

    def take(self) -> list[tuple[str, str]]:
        """What was shown since the last call."""
        shown, self.shown = self.shown, []
        return shown


@functools.cache
def recall_model():
    """The shipped backbone with the MSW adapter, and its tokenizer; shared by the tests of a process."""
    weights = find_weights()
    model, tokenizer = load_backbone(weights.backbone)
    return patch_model(model, weights.adapters["msw"]), tokenizer


def recall_chat(**settings) -> Chat:
    """A chat on the shipped backbone; ``settings`` of the session."""
    settings = {"context_turns": 4, "generation": {"do_sample": False}} | settings
    return Chat(MemorySession(*recall_model(), **settings), ListScreen(), small_world=True)


def have(chat: Chat, line: str) -> str:
    """What is shown for one line, which goes well: the texts of all kinds, one below the other."""
    assert take_line(chat, line), chat.screen.shown
    return "\n".join(text for kind, text in chat.screen.take() if kind != "hint")


def fail(chat: Chat, line: str) -> str:
    """The error that one line ends in."""
    assert not take_line(chat, line)
    kind, text = chat.screen.take()[-1]
    assert kind == "error"
    return text


def state_bits(chat: Chat) -> tuple:
    """Memory and messages, to compare bit for bit."""
    memory = chat.session.memory
    return {layer: state.numpy().tobytes() for layer, state in memory.items()}, chat.session.messages


def tiny_chat(screen, text: str) -> Chat:
    """A chat whose random model says ``text``."""
    tokenizer = thinking_tokenizer()
    model = patch_model(tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2), backend="reference")
    options = {"logits_processor": LogitsProcessorList([Says(tokenizer, text)]), "max_new_tokens": 300}
    return Chat(MemorySession(loud_adapter(model), tokenizer, generation=options), screen)


def write_tiny_model(directory: Path) -> tuple[str, str]:
    """A model that says one of two words for as long as it may, a tokenizer, and an adapter: their directories."""
    tokenizer = thinking_tokenizer()
    model = tiny_model(vocab_size=512, num_hidden_layers=2, eos_token_id=None)
    words = tokenizer(" market went", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        head = model.lm_head.weight.zero_()
        # Whatever the hidden state, one of the two is above the others' 0.
        head[words[0]], head[words[-1]] = 1.0, -1.0
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    save_adapter(loud_adapter(patch_model(model, backend="reference")), directory / "adapter")
    unpatch_model(model)
    return str(directory / "model"), str(directory / "adapter")
