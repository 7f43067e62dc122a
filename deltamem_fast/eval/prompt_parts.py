"""A prompt of another's benchmark, which is one string, as the document in it and what is asked about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Where benchmarks keep a document apart from the question, in the order in which they are looked for.
_DOCUMENTS = ("context", "passage", "article", "story", "document")
# A field of benchmarks whose prompts have none: IFEval's, and GPQA's, under each of the names that lm_eval has of them.
_WITHOUT = ("instruction_id_list", "Incorrect Answer 1")
_BLANK, _LINE = re.compile(r"\n[^\S\n]*\n\s*"), re.compile(r"\n")
_INSTRUCTION = 400  # characters at most of a first paragraph or line that counts as an instruction


@dataclass(frozen=True)
class Parts:
    """A prompt, cut in three; joined they are the prompt again.

    Attributes:
        before: instructions and worked examples, which stay with the question.
        document: what may leave the context; "" = the prompt has none.
        after: the question, with whatever follows it.
    """

    before: str
    document: str
    after: str

    def prompt(self, context: str) -> str:
        """The prompt with another context where the document was; the same white space stands around it.

        Without a document it is the prompt, whatever the context.
        """
        if not self.document:
            return self.before + self.after
        if not context:
            before = self.before.rstrip()
            gap = "\n\n" if before and self.after.strip() else ""
            return before + gap + self.after.lstrip()
        lead = len(self.document) - len(self.document.lstrip())
        end = len(self.document.rstrip())
        return self.before + self.document[:lead] + context.strip() + self.document[end:] + self.after

    @property
    def question(self) -> str:
        """What retrieval looks for."""
        return self.after.strip()


def has_document(fields: Mapping[str, Any]) -> bool:
    """Whether a prompt may have a document, by its benchmark's fields: choices or constraints are none."""
    return not any(name in fields for name in _WITHOUT)


def prompt_parts(text: str, fields: Mapping[str, Any] | None = None) -> Parts:
    """Where the document of a prompt is, and what stands before and after it.

    A prompt of a benchmark without documents (``has_document``) has none. If the benchmark has the document as a field
    of its own (``context``, ``passage``, ``article``, ``story``, ``document``, or ``input`` beside ``question``), and
    the prompt holds it, its last occurrence is the document. Else it is guessed: the question is what stands after the
    last blank line; it is the last line where there is no blank line, or where what follows the last one is most of
    the prompt. A short first paragraph (without blank lines: the first line; 400 characters at most, with something
    between it and the question) is an instruction. What is between is the document.

    Args:
        text: the prompt, without a chat template around it.
        fields: of the benchmark's question, as lm-evaluation-harness has it in ``doc``.
    """
    if not has_document(fields or {}):
        return Parts("", "", text)
    found = _field(fields or {})
    start = text.rfind(found) if found else -1
    if start >= 0:
        return Parts(text[:start], found, text[start + len(found) :])
    return _guessed(text)


def _field(fields: Mapping[str, Any]) -> str:
    names = [*_DOCUMENTS, *(["input"] if isinstance(fields.get("question"), str) else [])]
    values = (fields.get(name) for name in names)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


def _guessed(text: str) -> Parts:
    end = len(text.rstrip())
    gaps = [match for match in _BLANK.finditer(text, 0, end) if text[: match.start()].strip()]
    last = gaps[-1] if gaps else None
    if last is not None and 2 * (end - last.end()) <= end:
        place = last.end()
    else:  # no blank line, or the question's paragraph holds the document, too
        place = text.rfind("\n", 0, end) + 1
    start = _after_instruction(text, place, _BLANK if gaps else _LINE)
    return Parts(text[:start], text[start:place], text[place:])


def _after_instruction(text: str, place: int, ending: re.Pattern) -> int:
    """Where what stands before the question goes on behind its instruction; 0: it has none."""
    first = ending.search(text, 0, place)
    if first is None or first.start() > _INSTRUCTION or not text[: first.start()].strip():
        return 0
    return first.end() if text[first.end() : place].strip() else 0
