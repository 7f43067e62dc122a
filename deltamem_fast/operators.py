"""The four operators of agent memories on a MemoryState: ingest, retrieve, revise, forget."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .arguments import check_text, check_tokenizer
from .capture import capture_projections
from .errors import ArgumentError, ArgumentTypeError
from .record import decoder_of, identity_of, input_device, is_disabled, unwrap
from .reference import split_projections, valid_tokens
from .segment_means import segment_means
from .segments import sentence_spans
from .state import MemoryState
from .texts import encode_text

Message = Mapping[str, Any]
Text = str | Sequence[Message]

WRITE_TOKENS = 8192  # the write budget of the released recipe
TOKEN_STRENGTH, SEGMENT_STRENGTH = 8.0, 2.0  # of forget; see bench/holding/operators.py


@torch.no_grad()
def ingest(
    model: nn.Module,
    tokenizer,
    memory: MemoryState,
    text: Text,
    *,
    tokens: int = WRITE_TOKENS,
    progress: bool | None = None,
) -> int:
    """Write a text into a memory, in place, without answering: prefill alone, no logits, no cache that stays.

    A long text goes in pieces of whole sentences (or whole messages), each in a context of its own with positions
    from 0, as adapters are trained; the memory runs on from piece to piece.

    Args:
        model: patched.
        tokenizer: of the model; for SSW a fast one.
        memory: of one conversation.
        text: a str, which a user says (plain text where the tokenizer has no chat template), or messages.
        tokens: at most in a piece; a single sentence may exceed it.
        progress: a bar on stderr; None = if there are several pieces and stderr is a terminal.

    Returns:
        How many tokens went through the model.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written.
    """
    _check(model, memory)
    if memory.frozen:
        raise ArgumentError("memory: it is frozen (read-only), allowed one that may be written")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ArgumentError(f"tokens: got {tokens!r}, allowed an integer, 1 or more")
    pieces = [_encoded(model, tokenizer, piece) for piece in _pieces(tokenizer, _checked_text(text), tokens)]
    total = sum(arguments["input_ids"].shape[1] for arguments in pieces)
    for arguments in _with_bar(pieces, total, progress):
        decoder_of(unwrap(model))(**arguments, memory=memory, use_cache=False)
    return total


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
        options: of ``model.generate``.

    Returns:
        The answer's text, without thinking and special tokens.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    from .session.streaming import TextStream

    _check(model, memory)
    messages = _as_messages(_checked_text(question))
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("tokenizer: has no chat template, which shows the model where its answer begins")
    template = dict(template or {})
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **template
    )
    input_ids = torch.tensor([ids], device=input_device(model))
    # Not the memory's own flag: another thread may be writing it.
    arguments = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "memory": memory.read_only()}
    found = model.generate(**(options | arguments))
    stream = TextStream(tokenizer, tokenizer.decode(ids))
    for token in found[0, len(ids) :].tolist():
        list(stream.add(token))
    list(stream.end())
    return stream.answer


def revise(
    model: nn.Module, tokenizer, memory: MemoryState, text: Text, *, replaces: Text | None = None, **options: Any
) -> int:
    """Write what holds from now on, in place: by the delta rule the newer value takes the place of the older one.

    S ← S − β (S k) kᵀ + β v kᵀ: what the statement's keys pointed to is erased as far as the gate opens, and the new
    value is written there.

    Args:
        text: the new statement; see ``ingest``.
        replaces: the old statement: ``forget`` erases it first.
        options: of ``ingest``.

    Returns:
        How many tokens went through the model to be written.
    """
    if replaces is not None:
        _checked_text(text)
        forget(model, tokenizer, memory, replaces)
    return ingest(model, tokenizer, memory, text, **options)


@torch.no_grad()
def forget(
    model: nn.Module, tokenizer, memory: MemoryState, text: Text, *, strength: float | None = None
) -> MemoryState:
    """Erase what a text's keys point to, in place, and write nothing; returns the memory.

    The text is told to an empty memory, for the keys k and gates β of its tokens (one that knows it shuts its gates).
    Each token then erases here where it would have been written::

        S ← S − diag(1 − (1 − β)ⁿ) (S k) kᵀ

    which is what n tellings' erasing comes to, n = ``strength``. Nothing decays, no value is written; a token whose
    gate is shut erases nothing. (SSW: one erasure for each segment, by its mean.) Keys are shared: what other texts
    wrote under the same keys goes, too. `python -m bench.holding operators` measures how much.

    Args:
        model: patched.
        tokenizer: of the model.
        memory: of one conversation.
        text: what to forget, as it was said; see ``ingest``.
        strength: n, 0 or more; None = 8, and 2 for SSW, whose gates are open wider.

    Raises:
        ValueError, TypeError: naming the argument; the memory is as it was.
    """
    _check(model, memory)
    config = identity_of(model).config
    if strength is None:
        strength = SEGMENT_STRENGTH if config.segmented else TOKEN_STRENGTH
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < 1e9:
        raise ArgumentError(f"strength: got {strength!r}, allowed a number, 0 or more (less than 1e9)")
    pieces = [_encoded(model, tokenizer, piece) for piece in _pieces(tokenizer, _checked_text(text), WRITE_TOKENS)]
    scratch = MemoryState.zeros(model)
    with capture_projections() as found:
        for arguments in pieces:
            decoder_of(unwrap(model))(**arguments, memory=scratch, use_cache=False)
    memories = identity_of(model).memories
    for layer in memory:
        state = memory[layer]
        for arguments, projections in zip(pieces, found):
            state = _erased(memories[layer], projections[layer], arguments.get("segment_ids"), state, strength)
        memory.put(layer, state, in_place=True)
    return memory


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
    check_text(text, "text")
    if isinstance(text, str):
        if not text.strip():
            raise ArgumentError("text: got nothing but white space, allowed a text")
        return text
    if not isinstance(text, Sequence) or not all(isinstance(message, Mapping) for message in text):
        raise ArgumentTypeError(f"text: got {type(text).__name__}, allowed a str or a list of messages")
    if not text:
        raise ArgumentError("text: got no message, allowed one or more")
    return list(text)


def _as_messages(text: Text) -> list[Message]:
    return [{"role": "user", "content": text}] if isinstance(text, str) else list(text)


def _pieces(tokenizer, text: Text, tokens: int) -> list[Text]:
    """The text in pieces of at most about ``tokens`` tokens, cut between sentences or messages."""
    check_tokenizer(tokenizer)
    parts: list[tuple[Text, int]] = []
    for whole in [text] if isinstance(text, str) else [[message] for message in text]:
        content = whole if isinstance(whole, str) else whole[0].get("content")
        if not isinstance(content, str):
            parts.append((whole, 0))
            continue
        spans = sentence_spans(content)
        counts = _counts(tokenizer, [content[begin:end] for begin, end in spans])
        if sum(counts) <= tokens:
            parts.append((whole, sum(counts)))
            continue
        for begin, end, count in _grouped(spans, counts, tokens):
            cut = content[begin:end].strip()
            parts.append((cut if isinstance(whole, str) else [{**whole[0], "content": cut}], count))
    if isinstance(text, str):
        return [part for part, _ in parts]
    groups: list[list[Message]] = []
    room = 0
    for part, count in parts:
        if not groups or count > room:
            groups.append([])
            room = tokens
        groups[-1] += part
        room -= count
    return groups


def _grouped(spans, counts: list[int], tokens: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, tokens) of runs of sentences, each as long as fits."""
    begin, total = spans[0][0], 0
    for (first, _), count in zip(spans, counts):
        if total and total + count > tokens:
            yield begin, first, total
            begin, total = first, 0
        total += count
    yield begin, spans[-1][1], total


def _counts(tokenizer, sentences: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(sentences, add_special_tokens=False)["input_ids"]] if sentences else []


def _encoded(model: nn.Module, tokenizer, text: Text) -> dict[str, torch.Tensor]:
    """``input_ids`` [1, T] of a text, with ``segment_ids`` where the adapter writes segments."""
    device = input_device(model)
    ids, segments = encode_text(tokenizer, text, identity_of(model).config)
    return {"input_ids": ids.to(device)} | ({} if segments is None else {"segment_ids": segments.to(device)})


def _with_bar(pieces: list[dict[str, torch.Tensor]], total: int, progress: bool | None) -> Iterator[dict]:
    if progress is None:
        progress = len(pieces) > 1 and sys.stderr.isatty()
    if not progress:
        yield from pieces
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="tok", unit_scale=True, desc="ingest") as bar:
        for arguments in pieces:
            yield arguments
            bar.update(arguments["input_ids"].shape[1])


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
