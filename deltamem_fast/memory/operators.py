"""The four operators of agent memories on a MemoryState: ingest, retrieve, revise, forget."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..adapter.record import identity_of
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..arguments import check_integer, check_type
from ..errors import ArgumentError
from ..text.answering import THINKING_TOKENS, answer_options, check_reserved, warn_if_cut_off
from ..text.encode import chat_ids, check_known
from .state import MemoryState, taken_back
from .telling import WRITE_TOKENS, Encoded, Text, WriteResult, check_ready, checked_text, encoded_pieces, erase
from .trusting import check_trust, held_back, moved


@torch.no_grad()
def ingest(
    model: nn.Module,
    tokenizer,
    memory: MemoryState,
    text: Text,
    *,
    tokens: int = WRITE_TOKENS,
    trust: float = 1.0,
    budget: float | None = None,
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
        trust: τ, 0 to 1. The memory goes a share τ of the way to what the whole text would make of it,
            S ← S₀ + τ (S − S₀): however long the text, 1 − τ of what was there stays.
        budget: at most so far, in the norm of what was there, head by head (``trusting.hold_back``); None = as far as
            it goes.
        progress: a bar on stderr; None = if there are several pieces and stderr is a terminal.

    Returns:
        How many tokens went through the model, and how far they moved the memory.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written.
    """
    _check(model, memory)
    memory.check_writable()
    check_integer(tokens, "tokens", 1)
    check_trust(trust, budget)
    pieces = encoded_pieces(model, tokenizer, checked_text(text), tokens)
    total, device, before = sum(map(len, pieces)), input_device(model), memory.clone()
    with taken_back(memory):
        with held_back(memory, before, trust, budget):
            for piece in _with_bar(pieces, total, progress):
                decoder_of(unwrap(model))(**piece.arguments(device), memory=memory, use_cache=False)
        lost, far = memory.skipped_since(before.counters()), moved(before, memory)
    return WriteResult(total, pieces=len(pieces), skipped=lost, moved=far)


def _with_bar(pieces: list[Encoded], total: int, progress: bool | None) -> Iterator[Encoded]:
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
    messages = checked_text(question)
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
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
    model: nn.Module,
    tokenizer,
    memory: MemoryState,
    text: Text,
    *,
    replaces: Text | None = None,
    trust: float = 1.0,
    budget: float | None = None,
    tokens: int = WRITE_TOKENS,
    progress: bool | None = None,
) -> WriteResult:
    """Write what holds from now on, in place: by the delta rule the newer value takes the place of the older one.

    S ← S − β (S k) kᵀ + β v kᵀ: what the statement's keys pointed to is erased as far as the gate opens, and the new
    value is written there. Wholly or not at all, as ``ingest``.

    Args:
        text: the new statement; see ``ingest``.
        replaces: the old statement: ``forget`` erases it first.
        trust, budget: of both together; see ``ingest``.
        tokens, progress: see ``ingest``.

    Returns:
        How many tokens went through the model to be written.
    """
    if replaces is None:
        return ingest(model, tokenizer, memory, text, tokens=tokens, trust=trust, budget=budget, progress=progress)
    _check(model, memory)
    check_integer(tokens, "tokens", 1)
    check_trust(trust, budget)
    before = memory.clone()
    with taken_back(memory):
        with held_back(memory, before, trust, budget):
            checked_text(text)
            forget(model, tokenizer, memory, replaces)
            written = ingest(model, tokenizer, memory, text, tokens=tokens, progress=progress)
        far = moved(before, memory)
    return WriteResult(int(written), pieces=written.pieces, skipped=written.skipped, moved=far)


def forget(
    model: nn.Module, tokenizer, memory: MemoryState, text: Text, *, strength: float | None = None
) -> WriteResult:
    """Erase what a text has written, in place, and write nothing.

    The text is told to an empty memory, for the keys k, values v and gates β of its tokens (one that knows it shuts its
    gates). Each token then erases here what points to its own value under its key::

        S ← S − diag(1 − (1 − β)ᵐ) max(0, v̂ᵀ S k) v̂ kᵀ,    v̂ = v / ‖v‖,    m = n min(1, 4 β / widest)²

    where ``widest`` is the head's widest gate in the text: (1 − β)ⁿ, n = ``strength``, is left of what the text states,
    and words between, whose gates are nearly shut, erase next to nothing. What the chat template puts around the text,
    which every text writes, erases nothing, where it can be told apart (the tokenizer gives offsets, the messages have
    contents). Nothing decays, no value is written. (SSW: one erasure for each segment, by its mean, the template's part
    of it included.) Keys are shared and values alike: some of what others wrote goes, too.
    `python -m bench.memory operators` measures how much.

    Args:
        model: patched.
        tokenizer: of the model.
        memory: of one conversation.
        text: what to forget, as it was said; see ``ingest``.
        strength: n, 0 or more; None = as many as leave a tenth under the text's widest gates,
            three tenths in SSW, whose segments write of everything in them.

    Returns:
        How many tokens were told, and how many (token, layer) pairs of them had no finite key and erased nothing.

    Raises:
        ValueError, TypeError: naming the argument; the memory is as it was, also after any other error or an interrupt.
    """
    _check(model, memory)
    return erase(model, tokenizer, memory, text, strength)


def _check(model: nn.Module, memory: MemoryState) -> None:
    identity_of(model)  # raises for a model that has no memory
    check_type(memory, "memory", MemoryState, "a MemoryState")
    check_ready(model, memory)
