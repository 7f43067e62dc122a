"""A million tokens, a thousand turns, a bank of many users under kills: nothing drifts, grows or is lost."""

import pytest

from bench.life import bank, session, tokens

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("stream", tokens.STREAMS, ids=str)
def test_tokens(stream):
    row = tokens.lived(stream, 1_000_000)
    assert row.status == "measured", row.note


def test_a_model():
    row = tokens.model_lived(8192)
    assert row.status == "measured", row.note


def test_a_session():
    assert [row.note for row in session.measure(1100)] == [""] * 3


def test_a_bank(tmp_path):
    row = bank.measure(tmp_path, 20_000, 90.0, 3, 4.0)
    assert row.status == "measured", row.note
    assert row.values["kills"] > 4 and row.values["writes"] > 50
