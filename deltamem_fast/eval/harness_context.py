"""Prompts of lm-evaluation-harness under a context policy: what of each stays in context, and what is told instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..text.messages import Message
from .harness_segments import prompt_segments
from .harness_tasks import fields_of
from .policies import Policy
from .prompt_parts import prompt_parts
from .retrieval import CHUNK_TOKENS, chunks_of, finder_for, last_tokens, selected


class Contexts:
    """What is known of the prompts that are being run.

    Attributes:
        policy: what of a prompt's document stays in context.
        cuts: whether it leaves anything out.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer,
        render: Callable[[list[Message], bool], str],
        chunk_tokens: int = CHUNK_TOKENS,
        embedder: str | None = None,
    ):
        """
        Args:
            render: messages, whether an answer begins behind them → the prompt; it calls ``note``.
            chunk_tokens, embedder: of retrieval, see ``chunks_of`` and ``finder_for``.
        """
        self.policy, self.tokenizer, self.render = policy, tokenizer, render
        self.chunk_tokens, self.embedder = chunk_tokens, embedder
        self.cuts = policy.kind not in ("everything", "yarn")
        self._chats: dict[str, tuple[list[Message], bool]] = {}  # what was rendered, by what came of it
        self.clear()

    def clear(self) -> None:
        """Forget the requests; chats stay known, since they are rendered before their requests are run."""
        self._fields: dict[str, Mapping[str, Any]] = {}  # prompt → the benchmark's fields
        self._cut: dict[str, tuple[str, str]] = {}  # prompt → what ``under_policy`` has made of it
        self._finders: dict[str, tuple] = {}  # document → its chunks, and what finds some of them

    def note(self, text: str, chat: Sequence[Mapping[str, Any]], answer_begins: bool) -> None:
        """Keep the messages that a prompt was rendered from: the text does not say where one begins or ends."""
        self._chats[text] = ([dict(message) for message in chat], answer_begins)

    def begin(self, requests: Iterable) -> None:
        """Know the benchmark's fields of these requests' prompts."""
        if self.cuts:
            docs = ((request.args[0], request.doc) for request in requests)
            self._fields = {text: fields_of(doc) or (doc if isinstance(doc, Mapping) else {}) for text, doc in docs}

    def under_policy(self, text: str) -> tuple[str, str]:
        """A prompt with what the policy leaves in context, and what is told to the memory before it ("" = nothing)."""
        if not self.cuts:
            return text, ""
        if text not in self._cut:
            self._cut[text] = self._cut_anew(text)
        return self._cut[text]

    def segments(self, text: str, ids: Sequence[int], granularity: str, template: Mapping[str, Any]) -> list[int]:
        """The segment of each token of a prompt; see ``prompt_segments``."""
        chat, answer_begins = self._chats.get(text, (None, True))
        if chat is not None and not answer_begins:
            chat = chat[:-1]  # the last is the beginning of the answer
        return prompt_segments(self.tokenizer, ids, text, granularity, chat, template)

    def _cut_anew(self, text: str) -> tuple[str, str]:
        chat, answer_begins = self._chats.get(text, (None, True))
        if chat is None:
            return self._parted(text, text)
        place = max((i for i, message in enumerate(chat) if message["role"] == "user"), default=None)
        if place is None:
            return text, ""
        content, told = self._parted(chat[place]["content"], text)
        asked = [*chat[:place], chat[place] | {"content": content}, *chat[place + 1 :]]
        return self.render(asked, answer_begins), told

    def _parted(self, content: str, text: str) -> tuple[str, str]:
        fields = self._fields.get(text, {})
        parts = prompt_parts(content, fields)
        context, told = self._split(parts.document.strip(), str(fields.get("query") or parts.question))
        return parts.prompt(context), told

    def _split(self, document: str, question: str) -> tuple[str, str]:
        """What of a document is in context, and what is told; what retrieval finds is told, too, in its place."""
        if self.policy.kind == "nothing" or not document:
            return "", document
        if self.policy.kind == "last":
            start = last_tokens(self.tokenizer, document, self.policy.amount)
            return document[start:], document[:start].strip()
        if document not in self._finders:
            chunks = chunks_of(self.tokenizer, [document], self.chunk_tokens)
            self._finders[document] = chunks, finder_for(self.policy, chunks, self.embedder)
        return selected(self.policy, *self._finders[document], question), document
