"""The table of backbones is the one that the tests run over."""

from backbones import BACKBONES, table
from pages import ROOT

PAGE = ROOT / "docs/backbones.md"


def test_the_page_has_the_table_that_is_tested():
    assert table() in PAGE.read_text(encoding="utf-8"), f"put this in {PAGE.name}:\n{table()}"


def test_every_row_says_something_of_its_own():
    assert len({backbone.name for backbone in BACKBONES}) == len(BACKBONES)
    assert all(backbone.note for backbone in BACKBONES if backbone.path != "fast")
    assert all(bool(backbone.reason) == (backbone.path == "refused") for backbone in BACKBONES)
