"""Scores of words, against values counted by hand and against stems of Porter's paper."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as some

from deltamem_fast.errors import MissingPackageError
from deltamem_fast.eval import metrics
from deltamem_fast.eval.metrics import (
    best,
    exact_match,
    f1,
    mean,
    named,
    normalised,
    parts_f1,
    recall_at,
    stemmed_f1,
    stems,
    substring_match,
    token_f1,
    whole_words,
)

WORDS = some.lists(some.sampled_from("cat cats running runs blue a the and no house studies".split()), max_size=8)


@pytest.mark.parametrize(
    ("text", "without_and", "expected"),
    (
        ("The  Cat, and an Owl's nest!", False, "cat and owls nest"),
        ("The  Cat, and an Owl's nest!", True, "cat owls nest"),
        ("another theory", False, "another theory"),  # articles are whole words
        ("3,000 $", False, "3000"),
        ("a", False, ""),
    ),
)
def test_normalised(text, without_and, expected):
    assert normalised(text, without_and=without_and) == expected


def test_stems_are_porters():
    # Of the examples in Porter's paper (1980), but "dying" and "flies": NLTK's extensions.
    known = {
        "caresses": "caress", "ponies": "poni", "cats": "cat", "plastered": "plaster", "motoring": "motor",
        "hopping": "hop", "falling": "fall", "filing": "file", "relational": "relat", "generalizations": "gener",
        "oscillators": "oscil", "triplicate": "triplic", "hopefulness": "hope", "adjustment": "adjust",
        "dying": "die", "flies": "fli",
    }  # fmt: skip
    assert dict(zip(known, stems(" ".join(known)))) == known
    assert stems("Running and studies") == ["run", "studi"]


def test_the_mean_of_nothing_is_none():
    assert mean([]) is None and mean(iter([1.0, 0.0])) == 0.5


def test_whole_words():
    assert whole_words("It was 2, I think.", "2") == 1 and whole_words("12 weddings", "2") == 0
    assert whole_words("The catalogue", "cat") == 0 and whole_words("Sage green!", "the sage green") == 1


def test_f1_by_hand():
    # shared: cat, sat = 2; 3 words given, 3 wanted: precision 2/3, recall 2/3
    assert f1("cat sat down".split(), "cat sat up".split()) == pytest.approx(2 / 3)
    # shared: 1; precision 1/1, recall 1/2: 2 · 1 · ½ / 1½
    assert f1(["cat"], ["cat", "dog"]) == pytest.approx(2 / 3)
    # a word counts as often as both have it: shared 1 of 2 and 1
    assert f1(["cat", "cat"], ["cat"]) == pytest.approx(2 / 3)
    assert f1([], ["cat"]) == f1(["cat"], []) == f1([], []) == 0


def test_stemmed_f1_by_hand():
    assert stemmed_f1("She was running", "runs") == pytest.approx(0.5)  # she, wa, run: precision 1/3, recall 1
    assert stemmed_f1("tomatoes and beans", "tomato, bean") == 1.0
    assert token_f1("tomatoes beans", "tomato bean") == 0.0  # not stemmed


def test_parts_f1_by_hand():
    # parts wanted: "red apples" and "pears"; best for the first 2·1·½/1½ = 2/3 (apple), for the second 1; mean 5/6
    assert parts_f1("pear, apple", "red apples, pears") == pytest.approx(5 / 6)
    assert parts_f1("nothing of it", "red apples, pears") == 0


def test_token_f1_knows_yes_and_no():
    assert token_f1("no way", "no") == 0
    assert token_f1("No.", "no") == 1
    assert token_f1("no way", "way out") == pytest.approx(0.5)


def test_matches():
    assert exact_match("The Ostrow.", "ostrow") == 1
    assert exact_match("label: 43", "43") == 0
    assert substring_match("It is Ostrow, I think", "ostrow") == 1
    assert substring_match("1430", "43") == 1  # as published: parts of words count
    assert named("43", "1430") is False and named("43", "It is 43.") is True
    assert best(exact_match, "b", ["a", "B"]) == 1  # "a" is an article; "B" is not
    assert best(exact_match, "b", []) == 0


def test_recall_at_by_hand():
    assert recall_at(5, ["a", "b", "c", "d", "e", "f"], ["e", "f"]) == 0.5
    assert recall_at(1, [], ["a"]) == 0
    assert recall_at(5, ["a"], []) == 0


@given(WORDS, WORDS, some.randoms(use_true_random=False))
def test_f1_is_symmetric_within_bounds_and_blind_to_order(first, second, random):
    score = stemmed_f1(" ".join(first), " ".join(second))
    assert 0 <= score <= 1
    assert score == stemmed_f1(" ".join(second), " ".join(first))
    shuffled = random.sample(first, len(first))
    assert score == stemmed_f1(" ".join(shuffled), " ".join(second))


@given(some.text(max_size=30))
def test_normalising_twice_changes_nothing_more_in_words(text):
    once = normalised(text)
    assert exact_match(text, text) == 1
    assert once == " ".join(once.split())


def test_without_nltk_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.stem", None)
    metrics._stemmer.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match="pip install nltk"):
            stemmed_f1("a word", "words")
    finally:
        metrics._stemmer.cache_clear()
