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
from ..text.thinking import TextStream
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


DEFAULTS = Settings()


@dataclass(frozen=True)
class Remembered:
    """A memory of one document, and what it cost: tokens that were told, and seconds."""

    memory: MemoryState
    tokens: int
    seconds: float


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
    settings: Settings = DEFAULTS,
    keep: Callable[[Answer], None] = lambda answer: None,
    remembered: dict[str, Remembered] | None = None,
    leave_out: Callable[[Document, DoesNotFit], None] | None = None,
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
        remembered: by the document's id what wholes were told before, and are not told again: policies without a shared
            context take it from here, and put it here.

        leave_out: is told of a document that does not fit, which is then passed over; None = that is an error.

    Raises:
        DoesNotFit: of ``everything`` and ``last``, before the document is told.
        ValueError, ImportError, OSError: of the policy's retrieval, the tokenizer, or the settings.
    """
    found: list[Answer] = []
    with contextlib.ExitStack() as stack:
        if not memory and is_patched(model):
            stack.enter_context(memory_disabled(model))
        for first in range(0, len(documents), settings.batch):
            some = documents[first : first + settings.batch]
            run = []
            for document in some:
                try:
                    run.append(Prepared(model, tokenizer, task, document, policy, settings, memory))
                    run[-1].check_fits()
                except DoesNotFit as error:
                    if leave_out is None:
                        raise
                    leave_out(run.pop().document, error)
            reset_peak(input_device(model))
            known = {} if remembered is None or policy.shared else remembered
            told = _told(model, run, settings, known) if memory else [None] * len(run)
            for each, start in zip(run, told):
                for answer in each.answers(start):
                    keep(answer)
                    found.append(answer)
    return found


def _told(model: nn.Module, run: Sequence[Prepared], settings: Settings, known: dict[str, Remembered]) -> list:
    """Of each document what is remembered before it is asked about."""
    new = [each for each in run if each.document.id not in known]
    watch = Stopwatch(input_device(model))
    told = tell(model, [each.told for each in new], chunk=settings.chunk, batch=settings.batch)
    seconds = watch.seconds() / max(1, sum(told.tokens))
    made = {
        each.document.id: Remembered(told.memory.select([row]), tokens, tokens * seconds)
        for row, (each, tokens) in enumerate(zip(new, told.tokens))
    }
    known |= made
    return [known[each.document.id] for each in run]


class Prepared:
    """One document under one policy: what is told of it, and its questions as they are fed.

    Attributes:
        told: the windows that go to the memory; none without one.
        asked: the questions, each with its context.
    """

    def __init__(
        self, model, tokenizer, task: Task, document: Document, policy: Policy, settings: Settings, memory: bool
    ):
        self.model, self.tokenizer, self.task, self.policy, self.settings = model, tokenizer, task, policy, settings
        self.document = document
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
        ids = self._ids(self.task.prompt_with(context, question.text) if context else question.text)
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

    def answers(self, told: Remembered | None) -> Iterator[Answer]:
        """Of all questions, each with what telling has cost; ``told`` is not changed."""
        memory, cost = None, {}
        if told is not None:
            memory, cost = told.memory.clone(), {"told_tokens": told.tokens, "tell_seconds": round(told.seconds, 6)}
        options = answer_options(self.model, self.tokenizer, {"max_new_tokens": self.task.new_tokens})
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with self.positions():
            for some, arguments, reading in self.batches(memory):
                yield from self._generate(some, arguments, cost | reading, options)

    def new_tokens(self, asked: Asked) -> int:
        """How long an answer may be: as the settings say, else the question, else the task."""
        return self.settings.new_tokens or int(asked.question.more.get("new_tokens", self.task.new_tokens))

    def check_fits(self) -> int:
        """How many tokens the longest prompt and its answer take.

        Raises:
            DoesNotFit: more than the model was trained on, and the policy does not extend it.
        """
        longest = max((len(asked.ids) + self.new_tokens(asked) for asked in self.asked), default=0)
        most = trained_length(self.model)
        if longest > most and self.policy.kind != "yarn":
            raise DoesNotFit(
                f"policy {self.policy.name}: a prompt with its answer takes {longest:,} tokens, the model was trained "
                f"on {most:,}; allowed with it: shorter documents, or the policy yarn"
            )
        return longest

    def positions(self) -> contextlib.AbstractContextManager:
        """Inside, the model's positions reach as far as the longest prompt and its answer."""
        longest = self.check_fits()
        return extended(self.model, longest) if self.policy.kind == "yarn" else contextlib.nullcontext()

    def batches(self, memory: MemoryState | None) -> Iterator[tuple[list[Asked], dict, dict]]:
        """Questions that are fed together: they, what ``generate`` gets besides their ids, and what reading has cost.

        A shared context is read once, and ``memory`` is written as it is; its questions are then fed one by one.
        """
        if not self.policy.shared:
            for first in range(0, len(self.asked), self.settings.batch):
                some = self.asked[first : first + self.settings.batch]
                yield some, {} if memory is None else {"memory": memory.repeat(len(some)).read_only()}, {}
            return
        watch = Stopwatch(self.device)
        cache = self._read(self.shared_ids(), memory)
        cost = {"context_seconds": round(watch.seconds(), 6)}
        for asked in self.asked:
            arguments = {} if memory is None else {"memory": memory.read_only()}
            yield [asked], arguments | {"past_key_values": copied(cache)}, cost

    def shared_ids(self) -> list[int]:
        """What all prompts of a shared context begin with, whichever questions are asked."""
        probes = [self._ids(self.task.prompt_with(self.context, text)) for text in ("a", "1")]
        return _common([*probes, *(asked.ids for asked in self.asked)])

    @torch.no_grad()
    def _read(self, ids: list[int], memory: MemoryState | None) -> DynamicCache:
        decoder = decoder_of(unwrap(self.model))
        cache = DynamicCache(config=decoder.config)
        # An adapter that writes segments reads before the whole forward writes.
        chunk = len(ids) if self.segmented else self.settings.chunk or len(ids)
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
        text = self.task.prompt_with(self.context, asked.question.text)
        chat = [{"role": "user", "content": text}] if getattr(self.tokenizer, "chat_template", None) else text
        _, segments = encode_text(self.tokenizer, chat, identity_of(self.model).config)
        # With a single question the header of its answer belongs to what all share; it is no segment's.
        return torch.nn.functional.pad(segments, (0, max(0, len(ids) - segments.shape[1])), value=-1)[:, : len(ids)]

    def padded(self, some: Sequence[Asked]) -> dict[str, torch.Tensor]:
        """Ids and mask, int64 [B, T], padded on the left."""
        width = max(len(asked.ids) for asked in some)
        pad = self.tokenizer.pad_token_id or 0
        ids = [[pad] * (width - len(asked.ids)) + asked.ids for asked in some]
        mask = [[0] * (width - len(asked.ids)) + [1] * len(asked.ids) for asked in some]
        made = {"input_ids": ids, "attention_mask": mask}
        return {name: torch.tensor(rows, device=self.device) for name, rows in made.items()}

    @torch.no_grad()
    def _generate(self, some: Sequence[Asked], arguments: dict, cost: dict, options: dict) -> Iterator[Answer]:
        first, inputs = _FirstToken(self.device), self.padded(some)
        options = options | {"max_new_tokens": max(map(self.new_tokens, some))}
        watch = Stopwatch(self.device)
        found = self.model.generate(**inputs, stopping_criteria=StoppingCriteriaList([first]), **arguments, **options)
        seconds, prefill = watch.seconds(), first.at - watch.started
        ends = set(options.get("eos_token_id") or ())
        for asked, row in zip(some, found[:, inputs["input_ids"].shape[1] :].tolist()):
            row = row[: self.new_tokens(asked)]
            length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            yield Answer(
                id=asked.question.id,
                answer=self._answer(asked, row[:length]),
                context_tokens=asked.context_tokens,
                question_tokens=len(asked.ids) - asked.context_tokens,
                answer_tokens=length,
                prefill_seconds=round(prefill / len(some), 6),
                decode_seconds=round((seconds - prefill) / len(some), 6),
                peak_bytes=peak_of(self.device),
                **cost,
            )

    def _answer(self, asked: Asked, tokens: list[int]) -> str:
        """The text without special tokens, and without what a thinking model thinks before it."""
        stream = TextStream(self.tokenizer, self.tokenizer.decode(asked.ids))
        for token in tokens:
            list(stream.add(token))
        list(stream.end())
        return stream.answer.strip()


@torch.no_grad()
def first_logits(prepared: Prepared, memory: MemoryState | None) -> Iterator[torch.Tensor]:
    """Of each question the logits of its answer's first token, float32 [vocabulary] on the CPU."""
    with prepared.positions():
        for some, arguments, _ in prepared.batches(memory):
            options = {"max_new_tokens": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            found = prepared.model.generate(
                **prepared.padded(some), **arguments, **options, output_logits=True, return_dict_in_generate=True
            )
            yield from found.logits[0].float().cpu()


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
