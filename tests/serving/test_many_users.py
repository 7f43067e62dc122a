"""A server that is killed while turns are had: nothing that was acknowledged is lost, and nothing is crossed."""

import pytest

from bench.serving import kills
from bench.serving.__main__ import main


def no_errors(row):
    assert row.status == "measured", row.note
    return row.values


def test_a_killed_server_loses_nothing():
    values = no_errors(kills.measure(users=8, turns=3, kills=1, answer=6)[0])
    assert values["turns"] == 24 and values["distance"] < 1e-4
    assert values["repeated"] + values["unacknowledged"] > 0  # the kill has hit turns under way


@pytest.mark.soak
def test_64_users_and_three_kills():
    values = no_errors(kills.measure(users=64, turns=8, kills=3, answer=16)[0])
    assert values["turns"] == 512


@pytest.mark.soak
def test_64_clients_for_two_minutes(tmp_path):
    assert main(["load", "--output", str(tmp_path)]) == 0
