"""BM25 over what was told: the baseline without a memory."""

from __future__ import annotations

from collections.abc import Sequence


class Index:
    """BM25 (Lucene's variant, k1 1.5, b 0.75, English stop words left out) over the sentences of one conversation."""

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
