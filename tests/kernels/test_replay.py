"""Launches and calls that are done again: when they are taken for alike, and with which tensors."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")
from deltamem_kernels.triton import launch as launching  # noqa: E402
from deltamem_kernels.triton import replay  # noqa: E402

tl = triton.language


class Pair(NamedTuple):
    a_ptr: torch.Tensor | None
    b_ptr: torch.Tensor | None
    count: int
    WIDE: tl.constexpr


class Kernel:
    """Stands in for a compiled kernel: takes down what it is launched with, by the long way."""

    def __init__(self, *names):
        self.params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in names]
        self.calls = []

    def __getitem__(self, grid):
        def call(**given):
            self.calls.append((grid, given))
            return self

        return call


@pytest.fixture
def again(monkeypatch):
    """Launches by the short way: (programs, values)."""
    found = []

    def launch_again(launched, programs, tensor, values):
        found.append((programs, list(values)))

    monkeypatch.setattr(launching, "interpreted", lambda: False)
    monkeypatch.setattr(replay, "interpreted", lambda: False)
    monkeypatch.setattr(launching, "launch_again", launch_again)
    monkeypatch.setattr(replay, "launch_again", launch_again)
    monkeypatch.setattr(launching, "_launched", {})
    monkeypatch.setattr(replay, "_plans", {})
    return found


@pytest.mark.parametrize(
    "first,second,alike",
    [
        (2, 3, True), (16, 32, True), (1, 1, True), (1, 2, False), (1, 16, False), (16, 1, False), (2, 16, False),
        (0, 16, True), (2, 2**31 + 2, False), (True, 1, False), (0.5, 2.0, True), (None, 2, False),
    ],
)  # fmt: skip
def test_numbers_that_triton_compiles_alike(again, first, second, alike):
    kernel, x = Kernel("x_ptr", "n"), torch.zeros(4)
    for n in (first, second):
        launching.launch(kernel, 7, x, num_warps=1, x_ptr=x, n=n)
    assert len(kernel.calls) == (1 if alike else 2) and len(again) == (1 if alike else 0)
    if alike:
        assert again[0][0] == 7 and again[0][1][0] is x and again[0][1][1] == second


@pytest.mark.parametrize(
    "change",
    [
        {"x_ptr": torch.zeros(4, dtype=torch.bfloat16)}, {"x_ptr": torch.zeros(5)[1:]}, {"x_ptr": None}, {"WIDE": True},
        {"pair": Pair(torch.zeros(4), None, 1, tl.constexpr(3))},
        {"pair": Pair(torch.zeros(4), None, 5, tl.constexpr(4))},
        {"pair": Pair(None, None, 5, tl.constexpr(3))}, {"num_warps": 2}, {"registers": 64},
    ],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_what_differs_is_launched_the_long_way(again, change):
    kernel, x = Kernel("x_ptr", "pair", "WIDE"), torch.zeros(4)
    given = {"x_ptr": x, "pair": Pair(x, None, 5, tl.constexpr(3)), "WIDE": False, "num_warps": 1}
    launching.launch(kernel, 1, x, **given)
    launching.launch(kernel, 1, x, **given | change)
    assert len(kernel.calls) == 2 and not again
    launching.launch(kernel, 1, x, **given | change)
    assert len(kernel.calls) == 2 and len(again) == 1


def body(kernel):
    """A call of two launches: a state and a tuple from one tensor and another."""

    def run(x, y, scale):
        middle = replay.allocate((3,), torch.float32, x.device)
        out = replay.allocate((2, 2), torch.int32, x.device, zeros=True)
        launching.launch(kernel, 2, x, num_warps=1, x_ptr=x, n=5, pair=Pair(middle, y, 5, tl.constexpr(3)))
        launching.launch(kernel, 3, x, num_warps=1, x_ptr=middle, n=6, pair=Pair(out, None, 5, tl.constexpr(3)))
        return out, None, middle

    return run


def test_a_call_is_replayed_with_its_own_tensors(again):
    run = body(Kernel("x_ptr", "n", "pair"))
    first = replay.replayed(run, (torch.zeros(4), torch.zeros(4)), 2.0)
    assert not again and first[1] is None and first[2].shape == (3,)
    x, y = torch.ones(4), torch.ones(4)
    out, none, middle = replay.replayed(run, (x, y), 2.0)
    assert none is None and out.dtype == torch.int32 and out.shape == (2, 2) and not out.any()
    assert out is not first[0] and middle is not first[2]
    (programs, one), (after, two) = again
    assert (programs, after) == (2, 3)
    assert one[0] is x and one[1] == 5 and one[2][0] is middle and one[2][1] is y and one[2][2] == 5
    assert two[0] is middle and two[1] == 6 and two[2][0] is out and two[2][1] is None


def test_a_tensor_given_twice_is_two_places(again):
    run, x = body(Kernel("x_ptr", "n", "pair")), torch.zeros(4)
    replay.replayed(run, (x, x), 2.0)
    other, another = torch.zeros(4), torch.zeros(4)
    replay.replayed(run, (other, another), 2.0)
    assert again[0][1][0] is other and again[0][1][2][1] is another


@pytest.mark.parametrize(
    "inputs,settings",
    [
        ((torch.zeros(5), torch.zeros(4)), (2.0,)), ((torch.zeros(8)[::2], torch.zeros(4)), (2.0,)),
        ((torch.zeros(4), None), (2.0,)), ((torch.zeros(4), torch.zeros(5)[1:]), (2.0,)),
        ((torch.zeros(4), torch.zeros(4)), (3.0,)),
    ],
    ids=["shape", "stride", "none", "alignment", "setting"],
)  # fmt: skip
def test_what_differs_is_noted_anew(again, inputs, settings):
    run = body(Kernel("x_ptr", "n", "pair"))
    replay.replayed(run, (torch.zeros(4), torch.zeros(4)), 2.0)
    replay.replayed(run, inputs, *settings)
    assert len(replay._plans) == 2


def test_a_call_that_fails_leaves_no_plan(again):
    def fails(x):
        replay.allocate((1,), torch.float32, x.device)
        raise ValueError("no")

    with pytest.raises(ValueError):
        replay.replayed(fails, (torch.zeros(1),))
    assert not replay._plans and launching.notes.steps is None
