"""Retrieval, the memory's rival and companion: a document in chunks, and those that are nearest to a question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ..errors import ArgumentError, MissingPackageError
from ..model.libraries import require, told
from ..text.cutting import pieces_of
from ..text.segments import tokenize
from .data import BETWEEN
from .defaults import CHUNK_TOKENS, EMBEDDER
from .policies import RETRIEVING, Policy

_NEWER = 6  # sentence-transformers

Finder = Callable[[str], list[int]]  # a question → places of chunks, the best first


def chunks_of(tokenizer, parts: Sequence[str], tokens: int = CHUNK_TOKENS) -> list[str]:
    """Chunks of whole sentences of at most ``tokens`` tokens, none of two parts.

    Raises:
        ValueError: ``tokens`` is too little for one character.
    """

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def encode(text, name: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return [piece for part in parts if part.strip() for piece, _ in pieces_of(part, tokens, count, encode)]


def finder_for(policy: Policy, chunks: Sequence[str], embedder: str | None = None) -> Finder:
    """What finds ``policy.amount`` of a document's chunks for a question.

    Args:
        policy: of ``bm25`` or ``dense``.
        embedder: of ``dense``: a sentence-transformers model, a directory or hub id.

    Raises:
        ImportError: the package that does it is missing.
        ValueError, OSError: there is no such embedder.
    """
    amount = min(policy.amount, len(chunks))
    if amount == len(chunks):
        return lambda question: list(range(amount))
    return (_bm25 if policy.kind == "bm25" else _Dense(embedder))(chunks, amount)


def _bm25(chunks: Sequence[str], amount: int) -> Finder:
    require(("bm25s",), "policy bm25")
    import bm25s

    # stop words and a stemmer would be of one language
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(chunks), stopwords=None, show_progress=False), show_progress=False)

    def find(question: str) -> list[int]:
        words = bm25s.tokenize([question], stopwords=None, show_progress=False, return_ids=False)
        if not words[0]:
            return list(range(amount))
        return index.retrieve(words, k=amount, show_progress=False).documents[0].tolist()

    return find


class _Dense:
    """By the cosine of embeddings."""

    def __init__(self, embedder: str | None):
        self.model = load_embedder(embedder or EMBEDDER)

    def __call__(self, chunks: Sequence[str], amount: int) -> Finder:
        options = {"normalize_embeddings": True, "convert_to_numpy": True, "show_progress_bar": False}
        index = self.model.encode(list(chunks), **options)

        def find(question: str) -> list[int]:
            nearness = index @ self.model.encode([question], **options)[0]
            return nearness.argsort()[::-1][:amount].tolist()

        return find


@functools.lru_cache(maxsize=1)  # it is used for many documents
def load_embedder(name: str):
    """A sentence-transformers model; code that lies beside it is not run.

    Raises:
        ImportError, ValueError, OSError: it cannot be had, or sentence-transformers is older than 6, which runs what
            lies beside a model in a directory, whatever it is told; the message names it.
    """
    require(("sentence_transformers",), "policy dense")
    import sentence_transformers

    version = sentence_transformers.__version__
    if int(version.partition(".")[0]) < _NEWER:
        raise MissingPackageError(
            f"policy dense: got sentence-transformers {version}, allowed {_NEWER} or newer: those before run code that "
            "lies beside an embedder; pip install -U sentence-transformers"
        )
    with told(f"embedder: {name}"):
        return sentence_transformers.SentenceTransformer(name, trust_remote_code=False)


def last_tokens(tokenizer, text: str, amount: int) -> int:
    """Where in a text its last ``amount`` tokens begin, in characters; 0 = it has no more.

    Raises:
        ValueError: the tokenizer does not say which characters a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"tokenizer: got {type(tokenizer).__name__}, which is no fast tokenizer; the policy last needs one: "
            "only fast tokenizers say which characters a token covers"
        )
    starts = tokenize(tokenizer, text)[1]
    return starts[-amount] if len(starts) > amount else 0


def selected(policy: Policy, chunks: Sequence[str], finder: Finder, question: str, between: str = BETWEEN) -> str:
    """The found chunks in the order in which they were said, ``between`` (a blank line) between them."""
    if policy.kind not in RETRIEVING:
        raise ArgumentError(f"policy: got {policy.name}, allowed one that retrieves")
    return between.join(chunks[place] for place in sorted(finder(question)))
