"""What counts as an answer of the tokens that were generated."""

import pytest

from deltamem_fast.eval.costs import answer_length

WORDS = ["Rex", " ", "went", "\n", "home", ".", "\n\n"]


def decode(tokens):
    return "".join(WORDS[token] for token in tokens)


@pytest.mark.parametrize(
    "tokens,ends,stops,expected",
    [
        ([], {9}, (), 0),
        ([0, 1, 2], {9}, (), 3),
        ([0, 1, 2], (), (), 3),
        ([0, 9, 7, 7], {9}, (), 2),
        ([0, 8, 9], {8, 9}, (), 2),
        ([9, 9], {9}, (), 1),
        ([0, 3, 2, 4], {9}, ("\n",), 2),
        ([0, 3, 2, 3], {9}, ("\n\n", "home"), 4),
        ([0, 3, 3, 2, 4], {9}, ("\n\n",), 3),  # completed by the second of two tokens
        ([0, 6, 4], {9}, ("\n",), 2),  # in the middle of one
        ([0, 4, 5, 3], {9}, ("\n", "me"), 2),  # the first of several
    ],
)
def test_an_answers_length(tokens, ends, stops, expected):
    assert answer_length(tokens, ends, stops, decode) == expected
    if not stops:
        assert answer_length(tokens, ends) == expected


def test_what_stands_behind_an_end_is_not_decoded():
    assert answer_length([0, 9, 3, 7], {9}, ("\n",), lambda tokens: decode(one for one in tokens if one < 7)) == 2
