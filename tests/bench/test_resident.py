"""Growth is what is lost bit by bit, not what is held for a while."""

from bench.life.resident import grown


def test_what_is_given_back_is_no_growth():
    assert grown([100, 140, 100, 160, 100, 180, 100, 190, 100]) == 0
    assert grown([100, 90, 80, 70, 60, 50]) == 0
    assert grown([]) == grown([1, 2]) == 0


def test_a_leak_is():
    assert grown([100 + 10 * n for n in range(9)]) == 30
    assert grown([100 + 10 * n + 500 * (n % 2) for n in range(12)]) == 40
