"""What can answer a question: a memory, the backbone's own context, retrieval (BM25), or two of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from deltamem_fast import MemoryState
from deltamem_fast.recall.chats import ask, tell
from deltamem_fast.recall.task import user

from .conversations import Conversation, Messages, Question

# Characters of one batch, its padding included: about a quarter as many tokens.
BATCH = 1 << 17


@dataclass(frozen=True)
class Variant:
    """One line of a curve.

    Attributes:
        name: as in the results.
        adapter: whose memory reads along; None = the frozen backbone.
        told: whether that memory was told the conversation; False = it is empty.
        context: whether all that was told is in sight.
        retrieved: how many sentences BM25 puts in sight.
    """

    name: str
    adapter: str | None = None
    told: bool = True
    context: bool = False
    retrieved: int = 0


STRATEGIES = ("tsw-r8", "ssw-r8", "msw-r8")
# Trained alike, and a fifth as long as the adapters of the strategies.
RANKS = {rank: f"tsw-r{rank}-short" for rank in (4, 8, 16, 32)}
MEMORIES = tuple(Variant(name, name) for name in STRATEGIES)
OTHER_RANKS = tuple(Variant(name, name) for name in RANKS.values())
EMPTY = Variant("empty memory", "tsw-r8", told=False)
FROZEN = Variant("frozen")
CONTEXT = Variant("full context", context=True)
BM25_1, BM25_4 = (Variant(f"bm25 top {count}", retrieved=count) for count in (1, 4))
TOGETHER = Variant("bm25 top 1 + tsw-r8", "tsw-r8", retrieved=1)


class Index:
    """BM25 over what was told: the baseline without a memory.

    Lucene's variant (k1 1.5, b 0.75, English stop words left out) over the sentences of one conversation.
    """

    def __init__(self, sentences: Sequence[str]):
        import bm25s

        self._sentences = list(sentences)
        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self._index.index(_words(self._sentences), show_progress=False)

    def best(self, question: str, count: int) -> list[str]:
        """The ``count`` sentences that fit ``question`` best, in the order in which they were told.

        Of equals the newer one is taken; with fewer sentences, all.
        """
        scores = self._index.get_scores(_words([question])[0])
        ranked = sorted(range(len(self._sentences)), key=lambda i: (-scores[i], -i))
        return [self._sentences[i] for i in sorted(ranked[:count])]


def _words(texts: list[str]) -> list[list[str]]:
    import bm25s

    return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def answers(model: nn.Module, tokenizer, variant: Variant, conversations: Sequence[Conversation]) -> list[list[str]]:
    """The answers to each conversation's questions, each asked in a context of its own.

    Args:
        model: the bare backbone, or patched with the adapter of ``variant``. The memory is read-only while it answers.
    """
    found: list[list[str]] = []
    for part in _batches([_size(talk.told) for talk in conversations]):
        found += _batch(model, tokenizer, variant, conversations[part])
    return found


def _batch(model, tokenizer, variant: Variant, conversations: Sequence[Conversation]) -> list[list[str]]:
    memory = _memory(model, tokenizer, variant, conversations)
    rows = [row for row, talk in enumerate(conversations) for _ in talk.questions]
    chats = [chat for talk in conversations for chat in _chats(variant, talk)]
    texts: list[str] = []
    for part in _batches([_size(chat) for chat in chats]):
        texts += ask(model, tokenizer, chats[part], None if memory is None else memory.select(rows[part]))
    remaining = iter(texts)
    return [[next(remaining) for _ in talk.questions] for talk in conversations]


def _memory(model, tokenizer, variant: Variant, conversations: Sequence[Conversation]) -> MemoryState | None:
    if variant.adapter is None:
        return None
    if variant.told:
        return tell(model, tokenizer, [talk.told for talk in conversations])
    return MemoryState.zeros(model, len(conversations))


def _chats(variant: Variant, talk: Conversation) -> list[Messages]:
    index = Index(talk.sentences) if variant.retrieved else None
    return [[*_seen(variant, talk, index, question), user(question.fact.question())] for question in talk.questions]


def _seen(variant: Variant, talk: Conversation, index: Index | None, question: Question) -> Messages:
    if variant.context:
        return [*talk.told, *talk.visible]
    if index is None:
        return talk.visible
    return [user(" ".join(index.best(question.fact.question(), variant.retrieved))), *talk.visible]


def _size(chat: Messages) -> int:
    return sum(8 + len(message["content"]) for message in chat)


def _batches(sizes: Sequence[int]) -> Iterator[slice]:
    """Consecutive rows whose number × the longest stays within ``BATCH``, one row at least."""
    first = 0
    while first < len(sizes):
        last, longest = first + 1, sizes[first]
        while last < len(sizes) and max(longest, sizes[last]) * (last + 1 - first) <= BATCH:
            longest, last = max(longest, sizes[last]), last + 1
        yield slice(first, last)
        first = last
