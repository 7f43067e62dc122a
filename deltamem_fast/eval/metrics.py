"""Scores of an answer against accepted ones, each 0 to 1, as the benchmarks that use them publish them.

Normalisation, F1 and exact match are those of SQuAD (Rajpurkar et al. 2016); LoCoMo stems the words with Porter's
algorithm, and leaves "and" out with the articles.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ..errors import MissingPackageError

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ARTICLES_AND = re.compile(r"\b(a|an|the|and)\b")
# Of these an answer that is only partly right is wholly wrong.
_WHOLE = ("yes", "no", "noanswer")


def normalised(text: str, *, without_and: bool = False) -> str:
    """Lower case, without ASCII punctuation and articles, one space between words.

    Args:
        without_and: "and" is left out, too (LoCoMo).
    """
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join((_ARTICLES_AND if without_and else _ARTICLES).sub(" ", text).split())


def spaced(text: str) -> str:
    """Lower case, without articles, then a space for each punctuation mark: as the δ-mem paper's code compares."""
    return " ".join(re.sub(r"[^\w\s]", " ", re.sub(r"\b(a|an|the)\b", " ", text.lower())).split())


def stems(text: str) -> list[str]:
    """The words of a normalised text without "and", each as Porter's stemmer (NLTK's, with its extensions) cuts it.

    Raises:
        MissingPackageError: there is no nltk.
    """
    stem = _stemmer()
    return [stem(word) for word in normalised(text, without_and=True).split()]


@functools.cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem import PorterStemmer
    except ImportError as error:
        raise MissingPackageError(
            f"LoCoMo's score: needs the package nltk, which cannot be imported here ({error}); pip install nltk"
        ) from error
    return functools.lru_cache(maxsize=65536)(PorterStemmer().stem)


def f1(words: Sequence[str], accepted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of ``words`` as a bag; 0 where none is shared."""
    shared = sum((Counter(words) & Counter(accepted)).values())
    return 2 * shared / (len(words) + len(accepted)) if shared else 0.0


def stemmed_f1(answer: str, accepted: str) -> float:
    """F1 of the stems: LoCoMo's score of one answer."""
    return f1(stems(answer), stems(accepted))


def parts_f1(answer: str, accepted: str) -> float:
    """The mean over the accepted answer's parts of the best stemmed F1 of the answer's parts, both split at commas."""
    given = [stems(part) for part in answer.split(",")]
    wanted = [stems(part) for part in accepted.split(",")]
    return sum(max(f1(part, whole) for part in given) for whole in wanted) / len(wanted)


def token_f1(answer: str, accepted: str) -> float:
    """F1 of the normalised words; where one of the two is yes, no or noanswer, 1 if they are the same, else 0."""
    given, wanted = normalised(answer), normalised(accepted)
    if given != wanted and (given in _WHOLE or wanted in _WHOLE):
        return 0.0
    return f1(given.split(), wanted.split())


def exact_match(answer: str, accepted: str) -> float:
    """1 if both are the same when normalised."""
    return float(normalised(answer) == normalised(accepted))


def substring_match(answer: str, accepted: str) -> float:
    """1 if the accepted answer stands in the answer, both normalised; parts of words count, as published."""
    return float(normalised(accepted) in normalised(answer))


def whole_words(answer: str, accepted: str) -> float:
    """1 if the accepted answer stands in the answer as whole words, both normalised: "2" does not in "12"."""
    return float(named(accepted, answer))


def best(score: Callable[[str, str], float], answer: str, accepted: Sequence[str]) -> float:
    """The highest ``score`` of an answer over the accepted ones; 0 if there is none."""
    return max((score(answer, one) for one in accepted), default=0.0)


def recall_at(count: int, ranked: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of ``wanted`` that stands among the first ``count`` of ``ranked``; 0 if nothing is wanted."""
    first = set(ranked[:count])
    return sum(one in first for one in wanted) / len(wanted) if wanted else 0.0


def mean(values: Iterable[float]) -> float | None:
    """The mean; None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def named(value: str, text: str) -> bool:
    """Whether ``value`` stands in ``text`` as whole words, both normalised."""
    return f" {normalised(value)} " in f" {normalised(text)} "
