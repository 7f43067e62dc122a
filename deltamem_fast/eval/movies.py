"""Recommendations of movies: titles in a model's answer, and the known titles that they come nearest to."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

from ..errors import MissingPackageError
from .metrics import recall_at

_IN_PARENTHESES = re.compile(r"\([^()]*\)")
_LONGEST = 1000  # characters of a title that are compared: no movie's has as many, and nltk refuses 2,000
_NUMBER = re.compile(r"^\d+[.)、]?\s*[-—–]?\s*")


def recall_at_5(answer: str, wanted: Sequence[str], known: Sequence[str]) -> float:
    """The share of the wanted movies among the first five of an answer's list: MemoryAgentBench's Recall@5.

    What the answer lists is taken for the known title that is nearest by edit distance; of several as near the first.

    Args:
        answer: a list, numbered from "1." or with commas between.
        wanted: as the data set has them, ``http://dbpedia.org/resource/Iron_Man_(2008_film)`` or alike.
        known: all movies of the data set, likewise.

    Raises:
        MissingPackageError: a title is not among the known ones, and there is no nltk to measure distances.
    """
    all_of_them = tuple(known)
    found = [_nearest(title, all_of_them) for title in listed(answer)[:5]]
    return recall_at(5, found, [title_of(one) for one in wanted])


def title_of(entity: str) -> str:
    """``<http://…/Iron_Man_(2008_film)>`` → ``Iron Man``."""
    name = entity.split("/")[-1]
    for mark in "_->":
        name = name.replace(mark, " ")
    return " ".join(_IN_PARENTHESES.sub("", name).split())


def listed(answer: str) -> list[str]:
    """The lines of an answer from "1." on (without one, what its commas part), without numbers and parentheses."""
    before, mark, after = answer.partition("1.")
    lines = (after if mark else before.replace(",", "\n")).split("\n")
    return [" ".join(_NUMBER.sub("", _IN_PARENTHESES.sub("", line.strip())).split()) for line in lines]


@functools.lru_cache(maxsize=4)
def _titles(known: tuple[str, ...]) -> tuple[tuple[str, str, Counter], ...]:
    """Each different title, in lower case, and its letters."""
    names = dict.fromkeys(map(title_of, known))
    return tuple((name, name.lower(), Counter(name.lower())) for name in names)


@functools.lru_cache(maxsize=4096)
def _nearest(title: str, known: tuple[str, ...]) -> str:
    sought, titles = title.lower(), _titles(known)
    for name, lower, _ in titles:
        if lower == sought:
            return name
    letters, found, least = Counter(sought), "", float("inf")
    # Nearest in length first: the difference of lengths is the least that a distance can be, and so is that of letters.
    for name, lower, others in sorted(titles, key=lambda one: abs(len(one[1]) - len(sought))):
        if abs(len(lower) - len(sought)) >= least:
            break
        if max((letters - others).total(), (others - letters).total()) < least:
            if (distance := _edit_distance(sought, lower)) < least:
                found, least = name, distance
    return found


def _edit_distance(first: str, second: str) -> int:
    try:
        from nltk import edit_distance
    except ImportError as error:
        raise MissingPackageError(
            f"recommendations: needs the package nltk, which cannot be imported here ({error}); pip install nltk"
        ) from error
    return edit_distance(first[:_LONGEST], second[:_LONGEST])
