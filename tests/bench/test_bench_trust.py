"""What hostile text does, and what a guard costs: the commands at tiny sizes, and their tables."""

import argparse
import json

import pytest

from bench.instrument.rows import counted
from bench.memory import guard
from bench.recall import trust
from bench.report import trust as tables


def made_up(kept: float, learnt: float, **more):
    parameters = {"text": "contradiction 50", "guard": False, "way": "gates", "trust": 1.0} | more
    return counted("after/tsw-r8", parameters, kept=kept, learnt=learnt)


def test_before_and_after_shows_what_was_trusted_wholly_without_a_guard():
    others = [made_up(0.9, 0.1, guard=True), made_up(0.8, 0.2, trust=0.5), made_up(0.7, 0.3, way="share")]
    found = tables.before_and_after([made_up(0.09, 0.73), *others], [made_up(0.11, 0.71), *others])
    assert found.splitlines()[-1] == "| 50 tokens of contradiction | 9 / 73 | 11 / 71 |"
    assert "tsw-r8, before | tsw-r8, now" in found and len(found.splitlines()) == 3


def test_the_table_has_a_column_for_each_trust_and_leaves_out_what_was_not_asked():
    heading, table = tables.tables([made_up(0.5, 0.25), made_up(0.75, 0.125, way="share", trust=0.5)])
    columns = [cell.strip() for cell in table.splitlines()[0].split("|")]
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert heading == "### tsw-r8"
    assert cells[columns.index("trusted")] == "50 / 25" and cells[columns.index("text 0.5")] == "75 / 12"
    assert cells[columns.index("token 0.5")] == ""


def test_every_text_is_asked_about_at_every_trust(tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "TRUSTS", (1.0, 0.5, 0.0))
    monkeypatch.setattr(trust, "TEXTS", {name: trust.TEXTS[name] for name in ("contradiction 50", "random tokens 50")})
    options = argparse.Namespace(episodes=2, weights=None, adapters=["tsw-r8"], output=tmp_path)
    assert trust.run(options) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert path.name.endswith("-quick.json") and len(rows) == 2 * (1 + 3 + 1) + 2 * 2
    untouched = [row["values"]["kept"] for row in rows if row["parameters"].get("trust") == 0.0]
    before = [
        row["values"]["kept"] for row in rows if row["name"] == "before/tsw-r8" and not row["parameters"]["guard"]
    ]
    assert untouched == before and max(before) > 0.5
    with pytest.raises(ValueError, match="--episodes"):
        trust.run(argparse.Namespace(**vars(options) | {"episodes": 0}))


def test_the_guards_cost_is_a_ratio_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "TOKENS", 64)
    assert guard.run(argparse.Namespace(turns=2, output=tmp_path)) == 0
    (path,) = tmp_path.glob("*.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows["guard-scan/guarded"]["ratios"]) == {"free"} and len(rows) == 10
    with pytest.raises(ValueError, match="--turns"):
        guard.run(argparse.Namespace(turns=1, output=tmp_path))
