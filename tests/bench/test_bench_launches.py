"""The count of tensor operations and launches per decoded token and layer."""

import importlib
from pathlib import Path

import pytest
import torch

from deltamem_fast import patch_model
from deltamem_kernels.dispatch import installed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.instrument.launches")


@pytest.fixture
def costs(launches):
    return importlib.import_module("bench.speed.costs")


def test_views_do_not_count(launches):
    x = torch.randn(4, 4)
    with launches.counting() as count:
        y = x.t().view(16) if x.t().is_contiguous() else x.t().reshape(2, 8)  # one copy
        y[0].unsqueeze(0)
        x + 1
        torch.empty(3)
    assert dict(count.operations) == {"aten::clone": 1, "aten::add": 1, "aten::empty": 1}
    assert (count.total, count.allocations) == (3, 1)


def test_the_backbone_costs_56(launches, costs):
    """transformers' Qwen3 in bfloat16 under SDPA, the number that the target is made from."""
    assert launches.per_layer(lambda n: costs._variant("unpatched", n, torch.bfloat16)).total == 56


@pytest.mark.skipif(not installed("numba"), reason="numba is not installed")
def test_numba_calls_count_once_each(launches):
    import numba

    @numba.njit
    def inner(x):
        return x + 1

    @numba.njit
    def outer(x):
        return inner(x) * 2

    with launches.counting() as count:
        assert outer(1.0) == 4.0 and outer(2.0) == 6.0
    assert dict(count.launches) == {"outer": 2}
    outer(3.0)
    assert count.total == 2 and "__call__" not in vars(numba.core.dispatcher.Dispatcher)


@pytest.mark.skipif(not installed("triton"), reason="triton is not installed")
def test_triton_launches_count_without_a_gpu(launches):
    from deltamem_kernels.rule import DeltaRule
    from deltamem_kernels.triton import launch, ops

    before = launch.launch, launch.recorded
    rule = DeltaRule(8)
    with launches.triton_without_device(), launches.counting() as count, torch.no_grad():
        ops.step(torch.randn(2, rule.width), torch.zeros(8), torch.zeros(2, 1, 8, 8), rule)
    assert dict(count.launches) == {"step_kernel": 1}
    assert (launch.launch, launch.recorded) == before
    with pytest.raises(ValueError, match="need a GPU"):
        ops.step(torch.randn(2, rule.width), torch.zeros(8), torch.zeros(2, 1, 8, 8), rule)
    with pytest.raises(ValueError, match="allowed on a GPU"):
        patch_model(_tiny(), backend="triton")


def _tiny():
    from support import tiny_model

    return tiny_model()


def test_layers_that_differ_give_no_number(launches):
    """SmolLM3's layers without RoPE do less: of the last four here, one has it."""
    from support import tiny_model

    def build(layers):
        return tiny_model("smollm3", num_hidden_layers=layers, no_rope_layers=[1, 1, 1, 1, 1, 0, 0, 0][:layers])

    with pytest.raises(ValueError, match="layers differ"):
        launches.per_layer(build)


def test_rows(costs, monkeypatch):
    monkeypatch.setattr(costs.peers, "released", lambda: None)
    rows = {(row.name, row.parameters.get("backend")): row for row in costs.operation_rows()}
    assert rows["operations/unpatched", None].status == "measured"
    assert rows["operations/released", None].status == "absent"
    if installed("numba"):
        assert rows["operations/patched", "numba"].values["launches"] >= 1
