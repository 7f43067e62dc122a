"""Pictures of many states and of many layers: bounded, on one scale, each with its message."""

import matplotlib.figure
import pytest
import torch
from inspection_support import random_trace
from matplotlib.image import imread

from deltamem_fast.inspection.pictures import Snapshot, draw_heat_map, draw_trace, png_size, trace_png_size


def shots(layers, heads, rank=8, count=1):
    generator = torch.Generator().manual_seed(0)
    return [
        Snapshot(f"${name}$", {i: torch.randn(heads, rank, rank, generator=generator) for i in range(layers)})
        for name in range(count)
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1]
    )
    return saved


@pytest.mark.parametrize(
    ("layers", "heads", "rank", "count"), [(36, 4, 8, 1), (36, 4, 8, 3), (36, 1, 8, 1), (80, 8, 16, 2), (9, 1, 3, 1)]
)
def test_many_states_are_a_grid_of_bounded_size(tmp_path, figures, layers, heads, rank, count):
    taken = shots(layers, heads, rank, count)
    picture = imread(draw_heat_map(taken, tmp_path / "a.png"))
    assert picture.shape[1::-1] == png_size(taken) and max(picture.shape) <= 2400
    (figure,) = figures
    grids = [axes for axes in figure.axes if axes.images]
    largest = max(float(state.abs().max()) for shot in taken for state in shot.states.values())
    assert {(axes.images[0].norm.vmin, axes.images[0].norm.vmax) for axes in grids} == {(-largest, largest)}
    assert sum(axes.images[0].get_array().count() for axes in grids) == count * layers * heads * rank * rank
    named = [int(label.get_text()) for axes in grids for label in axes.get_xticklabels()]
    assert set(named) <= set(range(layers)) and (named == list(range(layers)) * count or layers > 36)


def test_the_grid_says_where_the_memory_lies(tmp_path, figures):
    (shot,) = shots(12, 4)
    for state in shot.states.values():
        state *= 0.01
    shot.states[7][2] = 5.0
    draw_heat_map([shot], tmp_path / "a.png")
    draw_heat_map([Snapshot("empty", {i: torch.zeros(4, 8, 8) for i in range(12)})], tmp_path / "b.png")
    told, empty = ([figure.get_suptitle(), *(text.get_text() for text in figure.texts)] for figure in figures)
    assert told[0] == "1 of 48 states holds half of the squared norm; outlined: most"
    assert "$0$: most in layer 7, head 2: norm 40, 100% of all squared" in told
    assert sum(len(axes.patches) for axes in figures[0].axes) == 1
    assert empty[0] == "All 48 states are empty" and not sum(len(axes.patches) for axes in figures[1].axes)


@pytest.mark.parametrize(("layers", "heads", "tokens"), [(36, 4, 40), (200, 8, 500), (3, 2, 12)])
def test_a_trace_is_told_in_its_titles_and_bounded(tmp_path, figures, layers, heads, tokens):
    found, _ = random_trace(layers=layers, heads=heads, tokens=tokens, states=False)
    found.writes[5] *= 1000
    picture = imread(draw_trace(found, tmp_path / "a.png"))
    assert picture.shape[1::-1] == trace_png_size(found) and max(picture.shape) <= 2400
    written, read = (axes for axes in figures[0].axes if axes.images and axes.get_title(loc="left"))
    assert written.get_title(loc="left").startswith("“word5” (token 5) writes most: ")
    assert "% of all that is read" in read.get_title(loc="left")
    rows = layers * heads if layers * heads <= 40 else layers
    assert written.images[0].get_array().shape == (rows, tokens)
