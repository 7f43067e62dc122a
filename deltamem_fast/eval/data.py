"""What every benchmark of ours comes down to: documents that are told, and questions about them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """One question about a document.

    Attributes:
        id: unique in its task.
        text: what the user asks, with the instructions of the benchmark's protocol.
        query: the question alone, which retrieval looks for; "" = ``text``.
        answers: the accepted ones; what more than one means is the score's business.
        category: what the benchmark reports apart.
        more: what else scoring needs (the outdated value, for instance), plain JSON. Three keys mean the same in every
            task: ``judge``, the kind of judgement that the benchmark's own score is made by; ``needs``, what is missing
            to score this question at all; ``new_tokens``, at most, of this answer, where it is not the task's.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    category: str = ""
    query: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


BETWEEN = "\n\n"  # the pieces of a document that is in context


@dataclass(frozen=True)
class Document:
    """A long text, in the order in which it was said, and what is asked about it.

    Attributes:
        id: unique in its task.
        parts: the text in pieces that belong together (sessions of a conversation, chunks of a book).
        questions: at least one.
    """

    id: str
    parts: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as the command line has it.
        title: as a report has it.
        load: a local file or directory, or None = where it is had from by itself → documents, always in one order.
            Raises ``ArgumentError`` or ``FileMissingError`` that say where the data can be got.
        score: question, answer → 0 to 1; None = only a judge can tell.
        prompt: how a text that is in context stands before a question, with ``{context}`` and ``{question}``.
        new_tokens: at most, of an answer.
        metric: the name of what ``score`` gives, without a comma.
        notes: what a reader of its figures has to know (audits, licence, protocol), a sentence each.
        apart: categories that the benchmark reports apart: no question of theirs is in a row's first figure.
        overall: category → the scores of its questions that were answered and could be scored → figures by name, the
            one that the benchmark is known by under ``overall``; None = the mean over all questions. A figure without a
            question in it is None.
        between: what stands between the pieces of a document that is in context: a blank line, where the model knows
            what that is.
    """

    name: str
    title: str
    load: Callable[[Path | None], list[Document]]
    score: Callable[[Question, str], float | None]
    prompt: str
    new_tokens: int
    metric: str
    notes: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    overall: Callable[[Mapping[str, Sequence[float]]], dict[str, float | None]] | None = None
    between: str = BETWEEN

    def new_tokens_of(self, question: Question) -> int:
        """At most, of an answer to ``question``."""
        return int(question.more.get("new_tokens", self.new_tokens))

    def prompt_with(self, context: str, question: str) -> str:
        """The prompt with both in it, whatever braces they have."""
        found = {"{context}": context, "{question}": question}
        return re.sub(r"\{context\}|\{question\}", lambda match: found[match[0]], self.prompt)
