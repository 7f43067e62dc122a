"""The questions about a document, answered under one policy, with a memory or without, and what each answer cost."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from ..adapter.record import identity_of, is_patched, memory_disabled
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..errors import ArgumentError
from ..memory.state import MemoryState
from ..text.answering import answer_options
from ..text.encode import check_known, encode_text
from ..text.segments import chat_ids
from .answers import Answer
from .costs import Stopwatch, peak_of, reset_peak
from .data import Document, Question, Task
from .extension import extended, trained_length
from .policies import RETRIEVING, Policy
from .retrieval import CHUNK_TOKENS, chunks_of, finder_for, selected
from .telling import CHUNK, Encoded, tell, windows_of


@dataclass(frozen=True)
class Settings:
    """What decides how documents are told and questions asked, besides the policy.

    Attributes:
        window: tokens of a context in which a document is told; 0 = the model's trained length, at most 8,192.
        chunk: tokens of a forward over a document.
        batch: questions answered together where each has a prompt of its own; documents told together.
        chunk_tokens: of what retrieval finds.
        embedder: of dense retrieval.
        new_tokens: of an answer at most; 0 = the task's.
        template: arguments of the chat template (``{"enable_thinking": False}``).
    """

    window: int = 0
    chunk: int = CHUNK
    batch: int = 8
    chunk_tokens: int = CHUNK_TOKENS
    embedder: str | None = None
    new_tokens: int = 0
    template: dict = field(default_factory=dict)


class DoesNotFit(ArgumentError):
    """A document with its question is longer than the model was trained to see, and the policy does not extend it."""


@dataclass(frozen=True)
class Asked:
    """A question as it is fed.

    Attributes:
        question: which.
        ids: of its whole prompt.
        context_tokens: of them, the context's and the template's around it.
    """

    question: Question
    ids: list[int]
    context_tokens: int


def answer_documents(
    model: nn.Module,
    tokenizer,
    task: Task,
    documents: Sequence[Document],
    policy: Policy,
    *,
    memory: bool,
    settings: Settings = Settings(),
    keep: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Answer every question of some documents.

    What is not in the context is told to a document's memory first, in windows (``telling.tell``). A context that all
    questions of a document share (``last``, ``everything``, ``yarn``) is read once and written to the memory as it is
    read. Questions, and chunks that retrieval finds (which were told already), are read with the memory as it stands
    then: no answer changes what the next question reads.

    Args:
        model: patched, or, without ``memory``, any causal language model; a patched one's memory is disabled then.
        documents: with the questions that are wanted.
        keep: is given each answer as soon as it is there.

    Raises:
        DoesNotFit: of ``everything`` and ``last``.
        ValueError, ImportError, OSError: of the policy's retrieval, the tokenizer, or the settings.
    """
    found: list[Answer] = []
    with contextlib.ExitStack() as stack:
        if not memory and is_patched(model):
            stack.enter_context(memory_disabled(model))
        for first in range(0, len(documents), settings.batch):
            some = documents[first : first + settings.batch]
            run = [_Document(model, tokenizer, task, document, policy, settings, memory) for document in some]
            watch = Stopwatch(input_device(model))
            reset_peak(input_device(model))
            told = (
                tell(model, [each.told for each in run], chunk=settings.chunk, batch=settings.batch) if memory else None
            )
            seconds = watch.seconds() / max(1, sum(bool(each.told) for each in run))
            for row, each in enumerate(run):
                start = None if told is None else told.memory.select([row])
                cost = {"told_tokens": told.tokens[row] if told else 0, "tell_seconds": seconds if each.told else 0.0}
                for answer in each.answers(start, cost):
                    keep(answer)
                    found.append(answer)
    return found


class _Document:
    """One document under one policy."""

    def __init__(self, model, tokenizer, task: Task, document: Document, policy: Policy, settings: Settings, memory):
        self.model, self.tokenizer, self.task, self.policy, self.settings = model, tokenizer, task, policy, settings
        self.parts = [part for part in document.parts if part.strip()]
        self.device = input_device(model)
        self.segmented = memory and identity_of(model).config.segmented
        before, self.context = self._split()
        self.chunks, self.find = [], None
        if policy.kind in RETRIEVING:
            self.chunks = chunks_of(tokenizer, self.parts, settings.chunk_tokens)
            self.find = finder_for(policy, self.chunks, settings.embedder)
        window = settings.window or min(8192, trained_length(model))
        self.told: list[Encoded] = windows_of(model, tokenizer, before, window) if memory else []
        self.asked = [self._ask(question) for question in document.questions]

    def _split(self) -> tuple[list[str], str]:
        """The parts that are told only, and the text that is in every question's context."""
        if self.policy.kind in ("everything", "yarn"):
            return [], "\n\n".join(self.parts)
        if self.policy.kind != "last":
            return self.parts, ""
        text, before = "\n\n".join(self.parts), []
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in found["offset_mapping"]]
        if len(starts) <= self.policy.amount:
            return [], text
        begin = starts[-self.policy.amount]
        left = begin
        for part in self.parts:  # what of each stands before the last tokens
            if left > 0:
                before.append(part[:left])
            left -= len(part) + 2
        return before, text[begin:]

    def _ask(self, question: Question) -> Asked:
        context = self.context
        if self.find is not None:
            context = selected(self.policy, self.chunks, self.find, question.query or question.text)
        ids = self._ids(self.task.prompt.format(context=context, question=question.text) if context else question.text)
        alone = len(self._ids(question.text))
        return Asked(question, ids, len(ids) - alone)

    def _ids(self, text: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            options = {**self.settings.template, "add_generation_prompt": True}
            ids = chat_ids(self.tokenizer, [{"role": "user", "content": text}], "question", options)
        else:
            ids = self.tokenizer(text)["input_ids"]
        check_known(self.model, ids)
        return ids

    def answers(self, memory: MemoryState | None, cost: dict) -> Iterator[Answer]:
        """Of all questions; ``cost``: of telling, which each repeats."""
        options = answer_options(
            self.model, self.tokenizer, {"max_new_tokens": self.settings.new_tokens or self.task.new_tokens}
        )
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        longest = max(len(asked.ids) for asked in self.asked) + options["max_new_tokens"]
        with contextlib.ExitStack() as stack:
            if self.policy.kind == "yarn":
                stack.enter_context(extended(self.model, longest))
            elif longest > (most := trained_length(self.model)):
                raise DoesNotFit(
                    f"policy {self.policy.name}: a prompt with its answer takes {longest:,} tokens, the model was "
                    f"trained on {most:,}; allowed with it: shorter documents, or the policy yarn"
                )
            if self.policy.shared and len(self.asked) > 0:
                yield from self._one_by_one(memory, cost, options)
            else:
                yield from self._together(memory, cost, options)

    def _together(self, memory: MemoryState | None, cost: dict, options: dict) -> Iterator[Answer]:
        """Questions with prompts of their own, padded on the left."""
        for first in range(0, len(self.asked), self.settings.batch):
            some = self.asked[first : first + self.settings.batch]
            width = max(len(asked.ids) for asked in some)
            pad = options.get("pad_token_id") or 0
            rows = [[pad] * (width - len(asked.ids)) + asked.ids for asked in some]
            mask = [[0] * (width - len(asked.ids)) + [1] * len(asked.ids) for asked in some]
            arguments = {"memory": memory.repeat(len(some)).read_only()} if memory is not None else {}
            yield from self._generate(some, rows, mask, arguments, cost, options)

    def _one_by_one(self, memory: MemoryState | None, cost: dict, options: dict) -> Iterator[Answer]:
        """Questions with one context: it is read, and written to the memory, once."""
        prefix = _common([asked.ids for asked in self.asked])
        watch = Stopwatch(self.device)
        cache = self._read(prefix, memory)
        cost = cost | {"context_seconds": watch.seconds()}
        for asked in self.asked:
            arguments = {"past_key_values": copied(cache)}
            if memory is not None:
                arguments["memory"] = memory.read_only()
            yield from self._generate([asked], [asked.ids], [[1] * len(asked.ids)], arguments, cost, options)

    @torch.no_grad()
    def _read(self, ids: list[int], memory: MemoryState | None) -> DynamicCache:
        decoder = decoder_of(unwrap(self.model))
        cache = DynamicCache(config=decoder.config)
        chunk = len(ids) if self.segmented else self.settings.chunk
        segments = self._segments(ids) if self.segmented else None
        for first in range(0, len(ids), max(1, chunk)):
            part = slice(first, first + chunk)
            arguments = {} if memory is None else {"memory": memory}
            if segments is not None:
                arguments["segment_ids"] = segments[:, part].to(self.device)
            piece = torch.tensor([ids[part]], device=self.device)
            decoder(piece, past_key_values=cache, use_cache=True, **arguments)
        return cache

    def _segments(self, ids: list[int]) -> torch.Tensor:
        """int64 [1, T] of the shared context: of the first question's prompt, as far as it goes."""
        asked = self.asked[0]
        text = self.task.prompt.format(context=self.context, question=asked.question.text)
        chat = [{"role": "user", "content": text}] if getattr(self.tokenizer, "chat_template", None) else text
        _, segments = encode_text(self.tokenizer, chat, identity_of(self.model).config)
        # With a single question the header of its answer belongs to what all share; it is no segment's.
        return torch.nn.functional.pad(segments, (0, max(0, len(ids) - segments.shape[1])), value=-1)[:, : len(ids)]

    @torch.no_grad()
    def _generate(self, some: Sequence[Asked], rows, mask, arguments: dict, cost: dict, options: dict):
        first = _FirstToken(self.device)
        watch = Stopwatch(self.device)
        found = self.model.generate(
            input_ids=torch.tensor(rows, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            stopping_criteria=StoppingCriteriaList([first]),
            **arguments,
            **options,
        )
        seconds, prefill = watch.seconds(), first.at - watch.started
        ends = set(options.get("eos_token_id") or ())
        for asked, row in zip(some, found[:, len(rows[0]) :].tolist()):
            length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            yield Answer(
                id=asked.question.id,
                answer=self.tokenizer.decode(row[:length], skip_special_tokens=True).strip(),
                context_tokens=asked.context_tokens,
                question_tokens=len(asked.ids) - asked.context_tokens,
                answer_tokens=length,
                prefill_seconds=prefill / len(some),
                decode_seconds=(seconds - prefill) / len(some),
                peak_bytes=peak_of(self.device),
                **cost,
            )


class _FirstToken(StoppingCriteria):
    """Stops nothing: notes when the first token was there."""

    def __init__(self, device: torch.device):
        self.device, self.at = device, 0.0

    def __call__(self, input_ids, scores, **_):
        if not self.at:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _common(rows: Sequence[list[int]]) -> list[int]:
    """The longest beginning that all rows have, without the last token of any: something is left to be fed."""
    least = min(len(row) for row in rows) - 1
    first = rows[0]
    for place in range(least):
        if any(row[place] != first[place] for row in rows):
            return first[:place]
    return first[:least]


def copied(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on by itself from the same keys and values: they are appended to by making new tensors."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made
