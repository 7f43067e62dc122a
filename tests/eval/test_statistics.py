"""Bootstrap intervals: cases that a hand can count, and what must hold for any scores."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltamem_fast.errors import ArgumentError
from deltamem_fast.eval.statistics import _DRAWS, Estimate, estimate, paired_difference

SCORES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=25)
QUICK = {"resamples": 200}
near = pytest.approx


def test_two_documents_of_unlike_size():
    # AA (probability 1/4): 0; AB or BA (1/2): 1 of 4; BB (1/4): 1.
    found = estimate([0, 0, 0, 1], ["A", "A", "A", "B"])
    assert (found.mean, found.low, found.high) == (0.25, 0.0, 1.0)
    assert found.above_zero == near(0.75, abs=0.015)
    assert (found.questions, found.documents, found.resampled) == (4, 2, "documents")


def test_documents_are_resampled_whole():
    # Right and wrong in each document alike: whichever are drawn, the mean is 1/2. Questions drawn alone would vary.
    found = estimate([0, 1, 0, 1, 0, 1], [1, 1, 2, 2, 3, 3])
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)


def test_a_single_document_resamples_questions_and_says_so():
    found = estimate([0, 1], ["only", "only"])
    assert (found.low, found.mean, found.high, found.resampled, found.documents) == (0.0, 0.5, 1.0, "questions", 1)
    assert found.above_zero == near(0.75, abs=0.015)


def test_one_question():
    assert estimate([0.25], ["A"]) == Estimate(0.25, 0.25, 0.25, 1.0, 1, 1, "questions")


def test_against_the_normal_approximation():
    scores = np.random.default_rng(1).random(400)
    found = estimate(scores, range(400))
    half = 1.96 * scores.std() / math.sqrt(400)
    assert found.low == near(scores.mean() - half, abs=0.1 * half)
    assert found.high == near(scores.mean() + half, abs=0.1 * half)


def test_paired_differences():
    # By document: A +1, B −1. AA 1/4: +1; AB 1/2: 0; BB 1/4: −1. Above 0: 1/4.
    found = paired_difference([1, 0], [0, 1], ["A", "B"])
    assert (found.mean, found.low, found.high) == (0.0, -1.0, 1.0)
    assert found.above_zero == near(0.25, abs=0.015)
    always = paired_difference([0.5, 0.9, 0.2], [0.25, 0.65, -0.05], "AAB")
    assert (always.low, always.high, always.above_zero) == (near(0.25), near(0.25), 1.0)
    assert paired_difference([1, 0], [1, 0], "AB").above_zero == 0.0


def test_ties_are_not_above_zero():
    # Of the 27 draws 7 have as much above as below (000, and the 6 orders of +−0), and 10 are above. 0.1 − 0.1 + 0 may
    # come out as 1e-17.
    found = estimate([0.1, -0.1, 0.0], "ABC")
    assert found.above_zero == near(10 / 27, abs=0.015)
    # AB and BA tie, with a rounding of 0.1 + 0.2 − 0.3; AA alone (1/4) is above.
    assert estimate([0.1, 0.2, -0.3, 0.0], "AABB").above_zero == near(0.25, abs=0.015)
    assert estimate([1e-9, 1e-9], "AB").above_zero == 1


def test_a_seed_gives_one_interval():
    scores, documents = np.random.default_rng(0).random(50), [i % 7 for i in range(50)]
    assert estimate(scores, documents, seed=3) == estimate(scores, documents, seed=3)
    assert estimate(scores, documents, seed=3).low != estimate(scores, documents, seed=4).low


def test_draws_in_several_pieces_are_as_many_as_asked_for():
    scores = [0.0, 1.0] * 3_000
    assert 2 * _DRAWS // len(scores) < 800
    found = estimate(scores, range(len(scores)), resamples=800)
    assert found.low == near(0.5 - 1.96 * 0.5 / math.sqrt(6_000), abs=0.003)


@given(score=st.floats(-10, 10), documents=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_equal_scores_have_an_interval_of_no_width(score, documents):
    found = estimate([score] * len(documents), documents, **QUICK)
    assert found.low == found.mean == found.high == score


# Rounding leaves nothing of the smallest score: two documents of unlike size then have one sum.
@example([(1e-17, 0), (0.0, 1), (0.0, 1), (1.0, 2), (1.0, 2), (0.5, 3)], 1.0)
@settings(max_examples=300)
@given(SCORES, st.floats(-5, 5))
def test_a_shift_of_all_scores_shifts_the_interval(pairs, shift):
    scores, documents = zip(*pairs)
    before = estimate(scores, documents, **QUICK)
    after = estimate([score + shift for score in scores], documents, **QUICK)
    for name in ("mean", "low", "high"):
        assert getattr(after, name) == near(getattr(before, name) + shift, abs=1e-9)


@given(SCORES, st.randoms(use_true_random=False))
def test_the_order_of_the_questions_and_the_names_of_the_documents_change_nothing(pairs, shuffler):
    shuffled = list(pairs)
    shuffler.shuffle(shuffled)
    (scores, documents), (others, names) = zip(*pairs), zip(*shuffled)
    assert estimate(scores, documents, **QUICK) == estimate(others, [f"document {9 - n}" for n in names], **QUICK)


@given(SCORES)
def test_an_interval_lies_within_the_scores_and_holds_the_mean_of_the_documents_means(pairs):
    scores, documents = zip(*pairs)
    found = estimate(scores, documents, **QUICK)
    assert min(scores) - 1e-12 <= found.low <= found.high <= max(scores) + 1e-12
    assert found.mean == near(sum(scores) / len(scores), abs=1e-12)


@settings(max_examples=50)
@given(SCORES)
def test_a_paired_difference_turned_round_is_its_negative(pairs):
    scores, documents = zip(*pairs)
    reference = [1 - score for score in scores]
    there, back = paired_difference(scores, reference, documents), paired_difference(reference, scores, documents)
    assert there.mean == near(-back.mean, abs=1e-12)


def test_bad_arguments():
    for arguments, said in (
        (([], []), "scores: got none"),
        (([1.0, float("nan")], [1, 2]), "scores: got one that is not finite"),
        (([1.0], [1, 2]), "documents: got 2, allowed one for each of 1 scores"),
        (([[1.0], [2.0]], [1, 2]), "scores: got shape"),
    ):
        with pytest.raises(ArgumentError, match=said):
            estimate(*arguments)
    with pytest.raises(ArgumentError, match="reference: got 1 scores, allowed 2"):
        paired_difference([1, 2], [1], [1, 1])
    with pytest.raises(ArgumentError, match="resamples"):
        estimate([1], [1], resamples=0)
