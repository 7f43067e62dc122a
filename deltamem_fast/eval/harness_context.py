"""Prompts of lm-evaluation-harness under a context policy: what of each stays in context, and what is told instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..text.messages import Message
from .harness_segments import prompt_segments
from .harness_tasks import fields_of
from .policies import Policy
from .prompt_parts import has_document, prompt_parts
from .retrieval import CHUNK_TOKENS, chunks_of, finder_for, last_tokens, selected


class Contexts:
    """What is known of the prompts that are being run.

    Attributes:
        policy: what of a prompt's document stays in context.
        cuts: whether it leaves anything out.
        cutting: whether it does so of the prompts that are being run; it does not where they have no document.
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
        # What was rendered, by what came of it: before a run for its requests, and by ``under_policy`` inside it.
        self._chats: dict[str, tuple[list[Message], bool]] = {}
        self._cut_chats: dict[str, tuple[list[Message], bool]] = {}
        self.clear()
        self._has_run = False

    def clear(self) -> None:
        """Forget the requests; a run of them has ended.

        Chats stay known until others are rendered: the same requests may be run again, and of an evaluation all are
        rendered before the first is run.
        """
        self.cutting, self._running, self._has_run = self.cuts, False, True
        self._fields: dict[str, Mapping[str, Any]] = {}  # prompt → the benchmark's fields
        self._cut: dict[str, tuple[str, str]] = {}  # prompt → what ``under_policy`` has made of it
        self._finders: dict[str, tuple] = {}  # document → its chunks, and what finds some of them
        self._cut_chats = {}

    def note(self, text: str, chat: Sequence[Mapping[str, Any]], answer_begins: bool) -> None:
        """Keep the messages that a prompt was rendered from: the text does not say where one begins or ends."""
        if not self._running and self._has_run:
            self._chats, self._has_run = {}, False
        known = self._cut_chats if self._running else self._chats
        known[text] = ([dict(message) for message in chat], answer_begins)

    def alike(self, places: Iterable[int], requests: Sequence) -> Iterator[tuple[list[int], list]]:
        """Places of requests that are run together, and these: the prompts have a document, or else none has.

        A prompt without a document is whole under every policy, and written to a memory as it is read.
        """
        groups: dict[bool, list[int]] = {}
        for place in places:
            doc = requests[place].doc
            asks = not self.cuts or not isinstance(doc, Mapping) or has_document(doc)
            groups.setdefault(asks, []).append(place)
        for some in groups.values():
            yield some, [requests[place] for place in some]

    def begin(self, requests: Iterable) -> None:
        """Know the benchmark's fields of these requests' prompts: see ``alike``."""
        self._running = True
        if self.cuts:
            docs = ((request.args[0], request.doc) for request in requests)
            self._fields = {text: _fields(doc) for text, doc in docs}
            self.cutting = any(map(has_document, self._fields.values()))

    def under_policy(self, text: str) -> tuple[str, str]:
        """A prompt with what the policy leaves in context, and what is told to the memory before it ("" = nothing)."""
        if not self.cutting:
            return text, ""
        if text not in self._cut:
            self._cut[text] = self._cut_anew(text)
        return self._cut[text]

    def segments(self, text: str, ids: Sequence[int], granularity: str, template: Mapping[str, Any]) -> list[int]:
        """The segment of each token of a prompt; see ``prompt_segments``."""
        chat, answer_begins = self._chat(text)
        if chat is not None and not answer_begins:
            chat = chat[:-1]  # the last is the beginning of the answer
        return prompt_segments(self.tokenizer, ids, text, granularity, chat, template)

    def _chat(self, text: str) -> tuple[list[Message] | None, bool]:
        return self._cut_chats.get(text) or self._chats.get(text) or (None, True)

    def _cut_anew(self, text: str) -> tuple[str, str]:
        chat, answer_begins = self._chat(text)
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


def _fields(doc: Any) -> Mapping[str, Any]:
    return fields_of(doc) or (doc if isinstance(doc, Mapping) else {})
