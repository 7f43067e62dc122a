"""Growth is what is lost bit by bit, not what is held for a while."""

import math

import torch

from bench.life import tokens
from bench.life.resident import grown


def test_what_is_given_back_is_no_growth():
    assert grown([100, 140, 100, 160, 100, 180, 100, 190, 100]) == 0
    assert grown([100, 90, 80, 70, 60, 50]) == 0
    assert grown([]) == grown([1, 2]) == 0


def test_a_leak_is():
    assert grown([100 + 10 * n for n in range(9)]) == 30
    assert grown([100 + 10 * n + 500 * (n % 2) for n in range(12)]) == 40


def test_no_number_is_hidden_behind_a_small_one():
    """A read that is NaN makes the row's distance NaN, whatever else is near."""
    exact, state = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 1, 3, 3, dtype=torch.float64).numpy()
    broken = torch.tensor([[1.0, 1.0, 1.0], [1.0, math.nan, 1.0]])
    assert math.isnan(tokens.larger(1e-9, tokens.read_distance(broken, exact, state)))
    assert tokens.read_distance(exact.float(), exact, state) == 0
    assert math.isnan(tokens.apart({0: exact, 1: broken}, {0: exact, 1: exact}))
