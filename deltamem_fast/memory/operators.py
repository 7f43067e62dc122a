"""The four operators of agent memories on a MemoryState: ingest, retrieve, revise, forget."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltamem_kernels.reference.recurrence import split_projections, valid_tokens
from deltamem_kernels.segment_means import segment_means

from ..adapter.record import decoder_of, identity_of, input_device, is_disabled, unwrap
from ..arguments import check_integer, check_text, check_tokenizer, shown
from ..errors import ArgumentError, ArgumentTypeError
from ..text.answering import THINKING_TOKENS, answer_options, check_reserved, warn_if_cut_off
from ..text.cutting import pieces_of
from ..text.encode import Message, chat_ids, check_known, encode_text, plain_content, plain_messages, says_something
from .capture import capture_projections
from .state import MemoryState, taken_back

Text = str | Sequence[Message]

WRITE_TOKENS = 8192  # the write budget of the released recipe
TOKEN_STRENGTH, SEGMENT_STRENGTH = 8.0, 2.0  # of forget; see bench/memory/operators.py


class WriteResult(int):
    """What ``ingest``, ``revise`` or ``forget`` has done: an int, the tokens that went through the model.

    Attributes:
        tokens: the same, as an attribute.
        pieces: in how many contexts they went.
        skipped: (token, layer) pairs left out because they were not finite.
    """

    pieces: int
    skipped: int

    def __new__(cls, tokens: int, *, pieces: int = 1, skipped: int = 0) -> WriteResult:
        made = super().__new__(cls, tokens)
        made.pieces, made.skipped = pieces, skipped
        return made

    def __getnewargs_ex__(self) -> tuple[tuple, dict]:
        return (int(self),), {"pieces": self.pieces, "skipped": self.skipped}

    @property
    def tokens(self) -> int:
        """How many tokens went through the model."""
        return int(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={int(self)}, pieces={self.pieces}, skipped={self.skipped})"


@torch.no_grad()
def ingest(
    model: nn.Module,
    tokenizer,
    memory: MemoryState,
    text: Text,
    *,
    tokens: int = WRITE_TOKENS,
    progress: bool | None = None,
) -> WriteResult:
    """Write a text into a memory, in place, without answering: prefill alone, no logits, no cache that stays.

    A long text goes in pieces of whole sentences (or whole messages), each in a context of its own with positions
    from 0, as adapters are trained; the memory runs on from piece to piece. A sentence that is too long is cut between
    lines, words or, at last, characters. It happens wholly or not at all: after an error or an interrupt the memory is
    what it was, at the same addresses.

    Args:
        model: patched.
        tokenizer: of the model; for SSW a fast one.
        memory: of one conversation.
        text: a str, which a user says (plain text where the tokenizer has no chat template), or messages, whose
            contents are strings or lists of text parts.
        tokens: at most in a piece, what the chat template adds included.
        progress: a bar on stderr; None = if there are several pieces and stderr is a terminal.

    Returns:
        How many tokens went through the model.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written.
    """
    _check(model, memory)
    memory.check_writable()
    check_integer(tokens, "tokens", 1)
    pieces = _encoded_pieces(model, tokenizer, _checked_text(text), tokens)
    total, device, before = sum(map(len, pieces)), input_device(model), memory.skipped
    with taken_back(memory):
        for piece in _with_bar(pieces, total, progress):
            decoder_of(unwrap(model))(**piece.arguments(device), memory=memory, use_cache=False)
    return WriteResult(total, pieces=len(pieces), skipped=int((memory.skipped - before).sum()))


def retrieve(
    model: nn.Module,
    tokenizer,
    memory: MemoryState,
    question: Text,
    *,
    template: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """Answer a question from a memory, in a context of its own; the memory is read, and not written.

    Args:
        model: patched.
        tokenizer: with a chat template.
        memory: of one conversation.
        question: a str, which the user asks, or messages.
        template: arguments of the chat template.
        options: of ``model.generate``, over the model's own; ``max_new_tokens`` is 512 unless given, and 2,048 more
            under a template that lets the model think first. One answer, sampled or greedy: no beams.

    Returns:
        The answer's text, without thinking and special tokens; "" with a warning (logger ``deltamem_fast``) if it was
        cut off before its thinking ended.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    from ..text.settings import check_values, checked_template
    from ..text.thinking import TextStream

    _check(model, memory)
    check_reserved(options, "options", "retrieve")
    check_values(options, "options")
    template = checked_template({} if template is None else template, "retrieve")
    messages = _as_messages(_checked_text(question))
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("tokenizer: has no chat template, which shows the model where its answer begins")
    ids = chat_ids(tokenizer, messages, "question", {**template, "add_generation_prompt": True})
    check_known(model, ids)
    options = answer_options(model, tokenizer, options, thinking=_may_think(tokenizer, template) * THINKING_TOKENS)
    input_ids = torch.tensor([ids], device=input_device(model))
    # Not the memory's own flag: another thread may be writing it.
    arguments = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "memory": memory.read_only()}
    found = model.generate(**(options | arguments))
    stream = TextStream(tokenizer, tokenizer.decode(ids))
    for token in found[0, len(ids) :].tolist():
        list(stream.add(token))
    list(stream.end())
    warn_if_cut_off("retrieve", stream)
    return stream.answer


def _may_think(tokenizer, template: Mapping[str, Any]) -> bool:
    """Whether the chat template knows of thinking, and it is not switched off."""
    shown = tokenizer.chat_template
    shown = " ".join(shown.values()) if isinstance(shown, Mapping) else str(shown)
    return "think>" in shown and template.get("enable_thinking") is not False


def revise(
    model: nn.Module, tokenizer, memory: MemoryState, text: Text, *, replaces: Text | None = None, **options: Any
) -> WriteResult:
    """Write what holds from now on, in place: by the delta rule the newer value takes the place of the older one.

    S ← S − β (S k) kᵀ + β v kᵀ: what the statement's keys pointed to is erased as far as the gate opens, and the new
    value is written there. Wholly or not at all, as ``ingest``.

    Args:
        text: the new statement; see ``ingest``.
        replaces: the old statement: ``forget`` erases it first.
        options: of ``ingest``.

    Returns:
        How many tokens went through the model to be written.
    """
    with taken_back(memory):
        if replaces is not None:
            _checked_text(text)
            forget(model, tokenizer, memory, replaces)
        return ingest(model, tokenizer, memory, text, **options)


@torch.no_grad()
def forget(
    model: nn.Module, tokenizer, memory: MemoryState, text: Text, *, strength: float | None = None
) -> WriteResult:
    """Erase what a text's keys point to, in place, and write nothing.

    The text is told to an empty memory, for the keys k and gates β of its tokens (one that knows it shuts its gates).
    Each token then erases here where it would have been written::

        S ← S − diag(1 − (1 − β)ⁿ) (S k) kᵀ

    which is what n tellings' erasing comes to, n = ``strength``. Nothing decays, no value is written; a token whose
    gate is shut erases nothing. (SSW: one erasure for each segment, by its mean.) Keys are shared: what other texts
    wrote under the same keys goes, too. `python -m bench.memory operators` measures how much.

    Args:
        model: patched.
        tokenizer: of the model.
        memory: of one conversation.
        text: what to forget, as it was said; see ``ingest``.
        strength: n, 0 or more; None = 8, and 2 for SSW, whose gates are open wider.

    Returns:
        How many tokens were told, and how many (token, layer) pairs of them had no finite key and erased nothing.

    Raises:
        ValueError, TypeError: naming the argument; the memory is as it was, also after any other error or an interrupt.
    """
    _check(model, memory)
    memory.check_writable()
    config = identity_of(model).config
    if strength is None:
        strength = SEGMENT_STRENGTH if config.segmented else TOKEN_STRENGTH
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < 1e9:
        raise ArgumentError(f"strength: got {shown(strength)}, allowed a number, 0 or more (less than 1e9)")
    pieces = _encoded_pieces(model, tokenizer, _checked_text(text), WRITE_TOKENS)
    scratch, device = MemoryState.zeros(model), input_device(model)
    with capture_projections() as found:
        for piece in pieces:
            decoder_of(unwrap(model))(**piece.arguments(device), memory=scratch, use_cache=False)
    memories = identity_of(model).memories
    with taken_back(memory):
        for layer in memory:
            state = memory[layer]
            for piece, projections in zip(pieces, found):
                segments = None if piece.segments is None else piece.segments.to(device)
                state = _erased(memories[layer], projections[layer], segments, state, strength)
            memory.put(layer, state, in_place=True)
    return WriteResult(sum(map(len, pieces)), pieces=len(pieces), skipped=int(scratch.skipped.sum()))


def _erased(adapter, projections: torch.Tensor, segment_ids, state: torch.Tensor, strength: float) -> torch.Tensor:
    """One layer's state [1, H, r, r] after the tokens of one piece have erased."""
    present = None
    if segment_ids is not None:
        projections, present, _ = segment_means(projections, segment_ids, None)
    _, bias = adapter.stacked()
    projections = projections.float()
    valid, _ = valid_tokens(projections, present)
    _, keys, _, _, _, beta = split_projections(
        torch.where(valid.unsqueeze(-1), projections, 0.0), bias.float(), adapter.rule
    )
    erase = (1 - (1 - beta) ** strength) * valid[:, :, None, None]
    for key, share in zip(keys.unbind(1), erase.unbind(1)):
        key = key.unsqueeze(-2)
        state = state - (share * (state * key).sum(-1)).unsqueeze(-1) * key
    return state


# --- texts


def _checked_text(text: Text) -> Text:
    if not isinstance(text, str):
        text = plain_messages(text)
        if not says_something(text) and not any(plain_content(m.get("content") or "", "text").strip() for m in text):
            raise ArgumentError("text: got messages with nothing but white space, allowed a text")
        return text
    if not text.strip():
        raise ArgumentError("text: got nothing but white space, allowed a text")
    check_text(text, "text")
    return text


def _as_messages(text: Text) -> list[Message]:
    return [{"role": "user", "content": text}] if isinstance(text, str) else list(text)


@dataclass(frozen=True)
class _Encoded:
    """Token ids [1, T] of a text on the CPU, and their segments where the adapter writes segments."""

    ids: torch.Tensor
    segments: torch.Tensor | None

    def __len__(self) -> int:
        return self.ids.shape[1]

    def arguments(self, device: torch.device) -> dict[str, torch.Tensor]:
        """For the decoder's forward."""
        segments = {} if self.segments is None else {"segment_ids": self.segments.to(device)}
        return {"input_ids": self.ids.to(device)} | segments


def _encoded_pieces(model: nn.Module, tokenizer, text: Text, tokens: int) -> list[_Encoded]:
    """A text in pieces of at most ``tokens`` tokens."""
    config = identity_of(model).config
    check_tokenizer(tokenizer)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def encode(part: Text, name: str) -> _Encoded:
        ids, segments = encode_text(tokenizer, part, config, name)
        check_known(model, ids[0].tolist())
        return _Encoded(ids, segments)

    found = [encoded for _, encoded in pieces_of(text, tokens, count, encode) if len(encoded)]
    if not found:
        raise ArgumentError("text: the tokenizer makes no token of it")
    return found


def _with_bar(pieces: list[_Encoded], total: int, progress: bool | None) -> Iterator[_Encoded]:
    if progress is None:
        progress = len(pieces) > 1 and sys.stderr.isatty()
    if not progress:
        yield from pieces
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="tok", unit_scale=True, desc="ingest") as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece))


# --- models


def _check(model: nn.Module, memory: MemoryState) -> None:
    identity = identity_of(model)
    if not isinstance(memory, MemoryState):
        raise ArgumentTypeError(f"memory: got {type(memory).__name__}, allowed a MemoryState")
    if memory.batch_size != 1:
        raise ArgumentError(f"memory: got {memory.batch_size} rows, allowed 1; see MemoryState.select")
    if is_disabled(unwrap(model)):
        raise ArgumentError("model: its memory is disabled here (memory_disabled)")
    identity.check(memory._identity)
    memory.check_whole()
