"""Answers on disk: one JSON object a line, so that a killed run goes on, and a new score needs no new run."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Answer:
    """What one row (a context policy with a memory, or without) answered to one question, and what that cost.

    Attributes:
        id: of the question.
        answer: the text, without special tokens.
        context_tokens: in context before the question, the chat template's included.
        question_tokens: of the question as it was fed.
        answer_tokens: generated.
        told_tokens: of the document that went through the model for the memory alone, shared by its questions.
        tell_seconds: of telling those, the document's whole; each of its questions repeats it.
        context_seconds: of reading the shared context, the document's whole, likewise; 0 = it is each question's own.
        prefill_seconds: from the question to its first token, with the context where it is the question's own.
        decode_seconds: of all further tokens.
        peak_bytes: the most memory that the process (on a GPU: the device) held while it answered.
    """

    id: str
    answer: str
    context_tokens: int = 0
    question_tokens: int = 0
    answer_tokens: int = 0
    told_tokens: int = 0
    tell_seconds: float = 0.0
    context_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_bytes: int = 0

    def to_dict(self) -> dict:
        """As a line of the file has it."""
        return asdict(self)
