"""The questions about a document, answered under one policy, with a memory or without, and what each answer cost."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..adapter.record import cache_argument, identity_of, is_patched, memory_disabled
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..errors import ArgumentError
from ..memory.state import MemoryState
from ..model.cache import MemoryLayerMixin
from ..text.answering import answer_options
from ..text.encode import attention_mask, check_known, encode_text, padded
from ..text.segments import chat_ids, common_length, segment_ids_under
from ..text.thinking import TextStream
from .answers import Answer
from .costs import FirstToken, Stopwatch, answer_length, peak_of, reset_peak
from .data import Document, Question, Task
from .defaults import BATCH, CHUNK, CHUNK_TOKENS
from .extension import extended, trained_length
from .policies import RETRIEVING, Policy
from .retrieval import chunks_of, finder_for, last_tokens, selected
from .telling import Encoded, Remembered, remember, window_for, windows_of


@dataclass(frozen=True)
class Settings:
    """What decides how documents are told and questions asked, besides the policy.

    Attributes:
        window: tokens of a context in which a document is told; 0 = the model's trained length, at most 8,192.
        chunk: tokens of a forward over a document.
        batch: questions of a document answered together; documents told together.
        chunk_tokens: of what retrieval finds.
        embedder: of dense retrieval.
        new_tokens: of an answer at most; 0 = the task's.
        template: arguments of the chat template (``{"enable_thinking": False}``).
    """

    window: int = 0
    chunk: int = CHUNK
    batch: int = BATCH
    chunk_tokens: int = CHUNK_TOKENS
    embedder: str | None = None
    new_tokens: int = 0
    template: dict = field(default_factory=dict)


DEFAULTS = Settings()
_HEADER = 64  # tokens of a prompt's end, in which a template may have begun to think
_APPENDED = (DynamicLayer, DynamicSlidingWindowLayer)


class DoesNotFit(ArgumentError):
    """A document with its question is longer than the model was trained to see, and the policy does not extend it."""


@dataclass(frozen=True)
class Asked:
    """A question as it is fed.

    Attributes:
        question: which.
        ids: of its prompt; where all questions share a context, behind what they share.
        context_tokens: how many more tokens its whole prompt has than the question without a context.
        find_seconds: that retrieval took.
    """

    question: Question
    ids: list[int]
    context_tokens: int
    find_seconds: float = 0.0


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
    skip: Collection[str] = (),
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
        skip: ids of questions that have an answer. A document whose questions all have one is passed over.

    Raises:
        DoesNotFit: of ``everything`` and ``last``, before the document is told.
        ValueError, ImportError, OSError: of the policy's retrieval, the tokenizer, or the settings.
    """
    found: list[Answer] = []
    with contextlib.ExitStack() as stack:
        if not memory and is_patched(model):
            stack.enter_context(memory_disabled(model))
        documents = [one for one in documents if any(question.id not in skip for question in one.questions)]
        together = settings.batch if memory else 1  # they are told together; each is asked about by itself
        for first in range(0, len(documents), together):
            some = documents[first : first + together]
            run = []
            for document in some:
                try:
                    run.append(Prepared(model, tokenizer, task, document, policy, settings, memory, skip))
                except DoesNotFit as error:
                    if leave_out is None:
                        raise
                    leave_out(document, error)
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
    told = remember(model, [each.told for each in new], chunk=settings.chunk, batch=settings.batch)
    known |= {each.document.id: one for each, one in zip(new, told)}
    return [known[each.document.id] for each in run]


class Prepared:
    """One document under one policy: what is told of it, and its questions as they are fed.

    Attributes:
        shared: ids that all prompts begin with, where the policy gives all the same context; else none.
        asked: the questions but those to skip, each with its context.
        longest: tokens that the longest prompt and its answer take; under ``yarn`` of all questions.

    Raises:
        DoesNotFit: they are more than the model was trained on, and the policy does not extend it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        task: Task,
        document: Document,
        policy: Policy,
        settings: Settings,
        memory: bool,
        skip: Collection[str] = (),
    ):
        self.model, self.tokenizer, self.task, self.policy, self.settings = model, tokenizer, task, policy, settings
        self.document = document
        self.parts = [part for part in document.parts if part.strip()]
        self.device = input_device(model)
        self.segmented = memory and identity_of(model).config.segmented
        before, self.context = self._split()
        watch = Stopwatch(self.device)
        self.chunks, self.find = [], None
        if policy.kind in RETRIEVING:
            self.chunks = chunks_of(tokenizer, self.parts, settings.chunk_tokens)
            self.find = finder_for(policy, self.chunks, settings.embedder)
        self.index_seconds = watch.seconds() if self.find is not None else 0.0
        self.shared = self._shared() if policy.shared else []
        self.asked, self.longest = [], 0
        for question in document.questions:
            # What is shared, and how long the longest is, depends on those that are skipped, too.
            if question.id in skip and not policy.shared:
                continue
            asked = self._ask(question)
            fed = len(self.shared) + len(asked.ids) + self.new_tokens(question)
            self._check_fits(fed)  # before others of such a length are tokenised
            self.longest = max(self.longest, fed)
            if question.id not in skip:
                self.asked.append(asked)
        self._before = before if memory else []

    @functools.cached_property
    def told(self) -> list[Encoded]:
        """The windows that go to the memory; none without one. Of a document that is remembered nobody asks."""
        window = window_for(self.model, self.settings.window)
        return windows_of(self.model, self.tokenizer, self._before, window, self.task.between)

    def _split(self) -> tuple[list[str], str]:
        """The parts that are told only, and the text that is in every question's context."""
        if self.policy.kind in ("everything", "yarn"):
            return [], self.task.between.join(self.parts)
        if self.policy.kind != "last":
            return self.parts, ""
        text, before = self.task.between.join(self.parts), []
        left = begin = last_tokens(self.tokenizer, text, self.policy.amount)
        for part in self.parts:  # what of each stands before the last tokens
            if left > 0:
                before.append(part[:left])
            left -= len(part) + len(self.task.between)
        return before, text[begin:]

    def _shared(self) -> list[int]:
        """What prompts begin with, up to the question: all of the context, which is then written to the memory.

        A question that makes other tokens of the context's end (``_ask``) leaves those to be read alone.
        """
        first, second = (self._ids(self.task.prompt_with(self.context, text)) for text in ("a", "1"))
        return first[: common_length(first, second)]

    def _ask(self, question: Question) -> Asked:
        context, watch = self.context, Stopwatch(self.device)
        if self.find is not None:
            context = selected(self.policy, self.chunks, self.find, question.query or question.text, self.task.between)
        seconds = watch.seconds() if self.find is not None else 0.0
        ids = self._ids(self.task.prompt_with(context, question.text) if context else question.text)
        tokens = len(ids) - len(self._ids(question.text))
        alike = common_length(ids, self.shared)
        if alike < len(self.shared):  # a question that changes how the context's end is tokenised
            rest, self.shared = self.shared[alike:], self.shared[:alike]
            self.asked = [replace(asked, ids=rest + asked.ids) for asked in self.asked]
        return Asked(question, ids[alike:], tokens, seconds)

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
        options = self.options()
        with self.positions():
            for some, arguments, seconds in self.batches(memory):
                yield from self._generate(some, arguments, cost | {"context_seconds": seconds}, options)

    def options(self) -> dict[str, Any]:
        """Of ``generate``: greedy, one answer."""
        options = answer_options(self.model, self.tokenizer, {"max_new_tokens": self.task.new_tokens})
        return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def new_tokens(self, question: Question) -> int:
        """How long an answer may be: as the settings say, else the question, else the task."""
        return self.settings.new_tokens or self.task.new_tokens_of(question)

    def _check_fits(self, tokens: int) -> None:
        most = trained_length(self.model)
        if tokens > most and self.policy.kind != "yarn":
            raise DoesNotFit(
                f"policy {self.policy.name}: a prompt with its answer takes {tokens:,} tokens, the model was trained "
                f"on {most:,}; allowed with it: shorter documents, or the policy yarn"
            )

    def positions(self) -> contextlib.AbstractContextManager:
        """Inside, the model's positions reach as far as the longest prompt and its answer."""
        return extended(self.model, self.longest) if self.policy.kind == "yarn" else contextlib.nullcontext()

    def batches(self, memory: MemoryState | None) -> Iterator[tuple[list[Asked], dict, float]]:
        """Questions that are fed together: they, what ``generate`` gets beside their ids, and the document's seconds.

        A shared context is read once, and ``memory`` is written as it is; its questions go on from copies of the cache.
        """
        seconds, cache = self.index_seconds, None
        if self.shared and self.asked:
            watch = Stopwatch(self.device)
            cache = self._read(self.shared, memory)
            seconds = watch.seconds()
        batch = self.settings.batch
        if cache is not None and not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
            batch = 1  # layers that keep a state of their own have no rows that could be repeated
        for first in range(0, len(self.asked), batch):
            some = self.asked[first : first + batch]
            arguments = {} if memory is None else {"memory": memory.repeat(len(some)).read_only()}
            if cache is not None:
                arguments["past_key_values"] = copied(cache, len(some))
            yield some, arguments, round(seconds, 6)
            arguments.clear()  # the next batch's copy of the cache is not to lie beside this one's

    @torch.no_grad()
    def _read(self, ids: list[int], memory: MemoryState | None) -> DynamicCache:
        decoder = decoder_of(unwrap(self.model))
        cache = DynamicCache(config=decoder.config)
        # An adapter that writes segments reads before the whole forward writes.
        chunk = len(ids) if self.segmented else self.settings.chunk or len(ids)
        segments = self._segments(ids) if self.segmented else None
        for first in range(0, len(ids), chunk):
            part = slice(first, first + chunk)
            arguments = {} if memory is None else {"memory": memory}
            if segments is not None:
                arguments["segment_ids"] = segments[:, part].to(self.device)
            piece = torch.tensor([ids[part]], device=self.device)
            arguments[cache_argument(self.model)] = cache
            decoder(piece, use_cache=True, **arguments)
        return cache

    def _segments(self, ids: list[int]) -> torch.Tensor:
        """int64 [1, T], of the shared context."""
        text, config = self.task.prompt_with(self.context, "a"), identity_of(self.model).config
        if getattr(self.tokenizer, "chat_template", None):
            chat, granularity = [{"role": "user", "content": text}], config.memory_write_granularity
            found, segments = segment_ids_under(self.tokenizer, chat, granularity, self.settings.template)
        else:
            found, segments = encode_text(self.tokenizer, text, config)
        if found[0, : len(ids)].tolist() != ids:
            raise ArgumentError("tokenizer: gives a text other tokens with segments than without")
        return segments[:, : len(ids)]

    def padded(self, some: Sequence[Asked]) -> dict[str, torch.Tensor]:
        """Ids and mask, int64 [B, T]: what all share, padding, and what each has of its own."""
        own = [asked.ids for asked in some]
        shared = torch.tensor(self.shared, dtype=torch.int64, device="cpu").expand(len(own), -1)
        ids = torch.cat([shared, padded(own, self.tokenizer.pad_token_id or 0, "left")], 1)
        mask = torch.cat([torch.ones_like(shared), attention_mask(own, "left")], 1)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    @torch.no_grad()
    def _generate(self, some: Sequence[Asked], arguments: dict, cost: dict, options: dict) -> Iterator[Answer]:
        inputs = self.padded(some)
        options = options | {"max_new_tokens": max(self.new_tokens(asked.question) for asked in some)}
        watch = Stopwatch(self.device)
        first = FirstToken(watch)
        found = self.model.generate(**inputs, logits_processor=LogitsProcessorList([first]), **arguments, **options)
        seconds, prefill = watch.seconds(), first.seconds
        ends = set(options.get("eos_token_id") or ())
        for asked, row in zip(some, found[:, inputs["input_ids"].shape[1] :].tolist()):
            row = row[: self.new_tokens(asked.question)]
            length = answer_length(row, ends)
            yield Answer(
                id=asked.question.id,
                answer=self._answer(asked, row[:length]),
                context_tokens=asked.context_tokens,
                question_tokens=len(self.shared) + len(asked.ids) - asked.context_tokens,
                answer_tokens=length,
                prefill_seconds=round(prefill / len(some) + asked.find_seconds, 6),
                decode_seconds=round((seconds - prefill) / len(some), 6),
                peak_bytes=peak_of(self.device),
                **cost,
            )

    def _answer(self, asked: Asked, tokens: list[int]) -> str:
        """The text without special tokens, and without what a thinking model thinks before it."""
        stream = TextStream(self.tokenizer, self.tokenizer.decode(asked.ids[-_HEADER:]))
        for token in tokens:
            list(stream.add(token))
        list(stream.end())
        return stream.answer.strip()


@torch.no_grad()
def first_logits(prepared: Prepared, memory: MemoryState | None) -> Iterator[torch.Tensor]:
    """Of each question the logits of its answer's first token, float32 [vocabulary] on the CPU."""
    with prepared.positions():
        for some, arguments, _ in prepared.batches(memory):
            options = prepared.options() | {"max_new_tokens": 1}
            options |= {"output_logits": True, "return_dict_in_generate": True}
            found = prepared.model.generate(**prepared.padded(some), **arguments, **options)
            yield from found.logits[0].float().cpu()


@torch.no_grad()
def whole_prompts(prepared: Prepared) -> Iterator[torch.Tensor]:
    """The same by one forward over each whole prompt, with neither cache nor mask."""
    with prepared.positions():
        for asked in prepared.asked:
            ids = torch.tensor([[*prepared.shared, *asked.ids]], device=prepared.device)
            yield prepared.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()


def copied(cache: DynamicCache, rows: int = 1) -> DynamicCache:
    """A cache of ``rows`` rows that goes on by itself from the same keys and values of one."""
    if all(type(layer) in _APPENDED or isinstance(layer, MemoryLayerMixin) for layer in cache.layers):
        made = copy.copy(cache)  # what is appended to makes new tensors
        made.layers = [copy.copy(layer) for layer in cache.layers]
    else:
        made = copy.deepcopy(cache)
    if rows > 1:
        made.batch_repeat_interleave(rows)
    return made
