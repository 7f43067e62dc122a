"""``deltamem``, a model of lm-evaluation-harness: a frozen backbone, bare or with a memory, under a context policy.

It is lm_eval's own ``hf`` model wherever the memory makes no difference to how a request is run. Every request has a
memory of its own, which begins empty: no row of a batch, no request and no run leaves anything to another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import LogitsProcessorList

from ..adapter.record import cache_argument, identity_of, is_disabled, is_patched
from ..adapter.wrappers import unwrap
from ..arguments import check_type
from ..errors import ArgumentError, ArgumentTypeError
from ..memory.state import MemoryState
from ..text.answering import as_ids
from ..text.encode import attention_mask, padded
from . import register
from .answering import Settings, answer_documents
from .costs import answer_length
from .defaults import CHUNK, CHUNK_TOKENS
from .extension import extended
from .harness_context import Contexts
from .harness_costs import Meter
from .harness_options import check_options, checked_telling, is_greedy, no_warning_of_models, with_end_of_thinking
from .harness_rolling import rolled
from .harness_segments import NOT_WRITTEN, positions
from .harness_tasks import by_document, is_ours
from .opening import open_model, strategy_of
from .policies import RETRIEVING, policy_named
from .telling import Remembered, remember, window_for, windows_of

register()


class DeltaMemLM(HFLM):
    """A causal language model with a δ-mem memory, or without, for ``lm_eval.simple_evaluate``.

    Args:
        pretrained: a model's directory, hub id or known name (``smollm2``); or a model of transformers, which may be
            patched, with its ``tokenizer``.
        adapter: a directory, a hub id, or the name of a shipped one (``smollm2/tsw``); None = the bare model, unless
            ``strategy`` names a shipped adapter of a known model.
        backend: of the memory, see ``patch_model``.
        strategy: ``tsw``, ``ssw``, ``ssw-sentence`` or ``msw``: how the adapter writes; None = as it was trained.
        policy: what of a prompt's document stays in context, see ``policies.policy_named``. With a memory, the rest is
            told to it first.
        device: as torch names it; None = a GPU if there is one.
        dtype, attention: see ``load_model``.
        tokenizer: with a model in ``pretrained``.
        window: tokens of a context in which a document is told; 0 = the trained length, at most 8,192.
        chunk: tokens of a forward over what is told.
        chunk_tokens: of what retrieval finds.
        embedder: of dense retrieval, see ``finder_for``.
        options: ``batch_size``, ``max_length``, ``enable_thinking`` and others of lm_eval's ``hf`` that concern how
            requests are run (``harness_options.PASSED``). ``think_end_token`` is ``</think>`` unless given, where the
            tokenizer has it as one token: an answer is what stands behind it.

    Attributes:
        least_length: tokens that positions are made for at least under ``yarn``: the longest request's
            (``length_of``), where some requests are to have the same positions as all.

    Raises:
        ValueError, TypeError, OSError, ImportError: naming the argument, before the weights are read.
    """

    def __init__(
        self,
        pretrained: Any,
        adapter: str | None = None,
        *,
        backend: str = "auto",
        strategy: str | None = None,
        policy: str = "everything",
        device: str | None = None,
        dtype: str = "auto",
        attention: str | None = None,
        tokenizer: Any = None,
        window: int = 0,
        chunk: int = CHUNK,
        chunk_tokens: int = CHUNK_TOKENS,
        embedder: str | None = None,
        **options: Any,
    ):
        check_options(options)
        self.policy = policy_named(policy)
        self._telling = checked_telling(window, chunk, chunk_tokens, embedder)
        if isinstance(pretrained, str):
            model, tokenizer = open_model(
                pretrained,
                adapter,
                strategy=strategy,
                backend=backend,
                device=device,
                dtype=dtype,
                attention=attention,
            )
        else:
            check_type(pretrained, "pretrained", torch.nn.Module, "a directory, a hub id, a known name, or a model")
            if tokenizer is None:
                raise ArgumentTypeError("tokenizer: got None, allowed the tokenizer of the model in pretrained")
            if adapter is not None or strategy is not None:
                raise ArgumentError(
                    "adapter, strategy: got one with a model in pretrained, allowed with a name; patch it before"
                )
            model = pretrained
        options = with_end_of_thinking(options, tokenizer)
        with no_warning_of_models():
            super().__init__(model, backend="causal", tokenizer=tokenizer, **options)
        self.model_name = pretrained if isinstance(pretrained, str) else str(model.config.name_or_path)
        self.least_length = 0
        retrieval = self._telling["chunk_tokens"], embedder
        self._contexts = Contexts(self.policy, self.tokenizer, self.apply_chat_template, *retrieval)
        self._memories: dict[str, Remembered] = {}  # by the text that was told, while requests are run
        self._waiting: dict[str, Any] = {}  # of the batch that was encoded last: arguments of generate
        self._meter = Meter(self.device)

    @property
    def remembers(self) -> bool:
        """Whether there is a memory, and it is not disabled here."""
        return is_patched(self.model) and not is_disabled(unwrap(self.model))

    @property
    def costs(self) -> dict[str, dict[str, Any]]:
        """What each answer took since ``generate_until`` was last called, by its prompt; see ``Meter``."""
        return self._meter.found

    @property
    def segmented(self) -> bool:
        """Whether there is a memory that writes segments."""
        return self.remembers and identity_of(self.model).config.segmented

    def get_model_info(self) -> dict:
        """What of the model a report records; nothing is asked of the hub."""
        memory = {}
        if self.remembers:
            identity = identity_of(self.model)
            memory = {"adapter": identity.adapter_name, "strategy": strategy_of(identity.config)}
            memory |= {"adapter_fingerprint": identity.fingerprints()["adapter_fingerprint"]}
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype).removeprefix("torch."),
            "pretrained": self.model_name,
            "policy": self.policy.name,
            "memory": memory or None,
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As ``hf`` does; the messages are kept, since the text does not say where one begins or ends."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        if self.segmented or self._contexts.cuts:
            self._contexts.note(text, chat_history, add_generation_prompt)
        return text

    # --- generating

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What the model says after each prompt; see ``lm_eval.api.model.LM.generate_until``.

        Questions of ``harness_tasks`` that are answered greedily go by their documents: each is told, or read, once.
        """
        ours = [place for place, request in enumerate(requests) if is_ours(request.doc) and is_greedy(request.args[1])]
        found: list[Any] = [None] * len(requests)
        for places, task, documents, tokens in by_document(ours, requests):
            settings = Settings(
                **self._telling,
                batch=self._rows,
                new_tokens=tokens or self.max_gen_toks,
                template=dict(self.chat_template_args),
            )
            answers = answer_documents(
                self.model, self.tokenizer, task, documents, self.policy, memory=self.remembers, settings=settings
            )
            by_id = {answer.id: answer.answer for answer in answers}
            for place in places:
                found[place] = by_id[requests[place].doc["question"]]
                self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
        others = sorted(set(range(len(requests))) - set(ours))
        self._meter.clear()
        for places, some in self._contexts.alike(others, requests):
            with self._running(some):
                for place, answer in zip(places, super().generate_until(some, disable_tqdm=disable_tqdm)):
                    found[place] = answer
        return found

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``hf`` does, of prompts under the policy; the memory that goes with them waits for ``_model_generate``."""
        prompts, told = zip(*map(self._contexts.under_policy, strings))
        ids, mask = super().tok_batch_encode(list(prompts), padding_side, left_truncate_len, **options)
        self._waiting = {}
        if self.segmented:
            rows = [self._segments(text, row[kept].tolist()) for text, row, kept in zip(prompts, ids, mask.bool())]
            self._waiting["segment_ids"] = padded(rows, NOT_WRITTEN, padding_side).to(self.device)
        if self.remembers and self._contexts.cutting:
            self._waiting["memory"] = self._told(told)
        remembered = [self._memories.get(text) for text in told]
        asked = self._contexts.cuts and not self._contexts.cutting
        self._meter.encoded(strings, mask.sum(1).tolist(), remembered, asked=asked)
        return ids, mask

    def _model_generate(self, context, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        waiting, self._waiting = self._waiting, {}
        with self._meter.generating() as first:
            watched = LogitsProcessorList([first])
            out = super()._model_generate(context, max_length, stop, logits_processor=watched, **waiting, **options)
        ends = {*as_ids(unwrap(self.model).generation_config.eos_token_id), *as_ids(self.eot_token_id)}
        rows = out[:, context.shape[1] :].tolist()
        self._meter.answered([self._answer_length(row, ends, stop) for row in rows])
        return out

    def _answer_length(self, row: list[int], ends: Collection[int], stop: Sequence[str]) -> int:
        """How many tokens of what was generated are the answer, with what was thought before it."""
        length = answer_length(row, ends)
        thought = next((place + 1 for place in reversed(range(length)) if row[place] == self.think_end_token), 0)
        return thought + answer_length(row[thought:length], (), stop, self.tok_decode)

    # --- scoring

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context; see ``lm_eval.api.model.LM.loglikelihood``."""
        found: list[Any] = [None] * len(requests)
        for places, some in self._contexts.alike(range(len(requests)), requests):
            with self._running(some):
                for place, answer in zip(places, super().loglikelihood(some, disable_tqdm=disable_tqdm)):
                    found[place] = answer
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return super()._encode_pair(self._contexts.under_policy(context)[0], continuation)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # A forward that reads what it has itself just written, token by token, needs no memory of the caller's.
        if not self.segmented and not (self.remembers and self._contexts.cutting):
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        found: list[Any] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        rows = override_bs or self._rows
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar:
            for first in range(0, len(order), rows):
                places = order[first : first + rows]
                for place, answer in zip(places, self._score([requests[i] for i in places])):
                    found[place] = answer
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                bar.update(len(places))
        return found

    @torch.no_grad()
    def _score(self, requests: Sequence) -> list[tuple[float, bool]]:
        """One batch: each context is read, and written live, then its continuation is read behind it.

        An adapter that writes segments reads the memory from before a forward: in one forward over both, a continuation
        would not know its context from the memory. ``generate`` has the same two steps.
        """
        contexts = [context[-max(1, self.max_length + 1 - len(end)) :] for _, context, end in requests]
        ends = [end for *_, end in requests]
        texts = ["" if text is None else text[0] for text, *_ in requests]
        prompts, told = zip(*map(self._contexts.under_policy, texts))
        memory = self._told(told) if self._contexts.cutting else MemoryState.zeros(self.model, len(requests))
        ids = padded(contexts, 0, "left").to(self.device)
        mask = attention_mask(contexts, "left").to(self.device)
        first = {}
        if self.segmented:
            owners = [self._segments(text, context) for text, context in zip(prompts, contexts)]
            first["segment_ids"] = padded(owners, NOT_WRITTEN, "left").to(self.device)
        out = self.model(
            ids, attention_mask=mask, position_ids=positions(mask), memory=memory, logits_to_keep=1, **first
        )
        logits = [out.logits]
        if max(map(len, ends)) > 1:
            begun = [end[:-1] for end in ends]
            more = padded(begun, 0).to(self.device)
            mask = torch.cat([mask, attention_mask(begun).to(self.device)], 1)
            then = {"segment_ids": NOT_WRITTEN} if self.segmented else {}
            places = positions(mask)[:, -more.shape[1] :]
            behind = {cache_argument(self.model): out.past_key_values, "memory": memory}
            logits.append(self.model(more, attention_mask=mask, position_ids=places, **behind, **then).logits)
        scores = F.log_softmax(torch.cat(logits, 1), dim=-1, dtype=self.softmax_dtype)
        found = []
        for row, end in zip(scores, ends):
            wanted = torch.tensor(end, device=row.device)
            row = row[: len(end)]
            total = float(row.gather(1, wanted[:, None]).sum())
            found.append((total, bool((row.argmax(-1) == wanted).all())))
        return found

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts. What does not fit a window runs on in the memory, if there is one.

        See ``harness_rolling.rolled``.
        """
        if not self.remembers:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        ids = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0) as bar:
            totals = rolled(
                self.model, ids, self.max_length, rows=self._rows, segmented=self.segmented, dtype=self.softmax_dtype,
                done=bar.update,
            )  # fmt: skip
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- a request's memory

    @contextlib.contextmanager
    def _running(self, requests: Sequence) -> Iterator[None]:
        """Inside, the benchmark's fields of each prompt are known, and what was told is remembered; afterwards not."""
        before = self._max_length
        with contextlib.ExitStack() as afterwards:
            if self.policy.kind == "yarn":
                length = max((self.least_length, *map(self.length_of, requests)))
                afterwards.enter_context(extended(self.model, length))
                self._max_length = max(self.max_length, length)
            self._contexts.begin(requests)
            try:
                yield
            finally:
                self._max_length = before
                self._contexts.clear()
                self._memories, self._waiting = {}, {}

    def length_of(self, request) -> int:
        """How many tokens a request of lm_eval's needs positions for: its prompt and what may come behind it."""
        text, more = request.args[:2]
        if isinstance(more, str):
            return len(self.tok_encode(text + more))
        return len(self.tok_encode(text)) + int(more.get("max_gen_toks", self.max_gen_toks))

    def cut_off(self, requests: Sequence) -> tuple[int, int]:
        """How many of these prompts to answer are cut at their beginning, and how many tokens fit before an answer.

        0 under policies that retrieve, where it is not counted, and ``yarn``, which reaches as far as is asked.
        """
        if self.policy.kind in (*RETRIEVING, "yarn"):
            return 0, 0
        self._contexts.begin(requests)
        try:
            found, fits = 0, []
            for text, options in (request.args[:2] for request in requests):
                fits.append(self.max_length - int(options.get("max_gen_toks", self.max_gen_toks)))
                found += len(self.tok_encode(self._contexts.under_policy(text)[0])) > fits[-1]
            return found, min(fits, default=0)
        finally:
            self._contexts.clear()

    def _told(self, texts: Sequence[str]) -> MemoryState:
        """A memory of a row for each text, which is told once however many ask about it.

        What was told as a whole is read and not written further, as ``answering`` has it; behind a document that goes
        on in the context (``last``) it is written.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._memories]
        window = window_for(self.model, self._telling["window"])
        windows = [windows_of(self.model, self.tokenizer, [text], window) for text in new]
        told = remember(self.model, windows, chunk=self._telling["chunk"], batch=self._rows)
        self._memories |= dict(zip(new, told))
        memory = MemoryState.cat([self._memories[text].memory for text in texts])
        return memory if self.policy.shared else memory.read_only()

    def _segments(self, text: str, ids: Sequence[int]) -> list[int]:
        granularity = identity_of(self.model).config.memory_write_granularity
        return self._contexts.segments(text, ids, granularity, self.chat_template_args)

    @property
    def _rows(self) -> int:
        if self.batch_size == "auto":
            self.batch_size_per_gpu = self._detect_batch_size()
        return int(self.batch_size)
