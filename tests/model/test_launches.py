"""Tensor operations and kernel launches of a decoded token and layer: what eager decode pays for."""

import pytest
import torch
from support import tiny_model
from test_fast_path import force_generic

from bench.instrument.launches import per_layer, triton_without_device
from deltamem_fast import DeltaMemConfig, patch_model

LIMIT, STRETCH = 56, 34  # of a layer of Qwen3; an un-patched one costs 56


def backbone(layers, family="qwen3"):
    extra = {} if family == "qwen3" else {"no_rope_layers": [1] * layers}
    return tiny_model(family, dtype=torch.bfloat16, num_hidden_layers=layers, **extra)


def patched(layers, backend="reference", config=None, family="qwen3"):
    return patch_model(backbone(layers, family), config, backend=backend)


def test_a_backbone_without_a_memory_costs_what_is_published():
    assert per_layer(backbone).total == LIMIT


@pytest.mark.parametrize("batch", (1, 3))
def test_triton_kernels(batch):
    with triton_without_device():
        count = per_layer(lambda layers: patched(layers, "triton"), batch)
        assert count.launches == {"decode_kernel": 1}
        assert count.total <= STRETCH, count
        everything = DeltaMemConfig(delta_heads=tuple("qkvo"), delta_o_rmsnorm=True, trainable_delta_scale=True)
        assert per_layer(lambda layers: patched(layers, "triton", everything), batch).total <= LIMIT
        msw = per_layer(lambda layers: patched(layers, "triton", DeltaMemConfig.msw(heads=4)), batch)
        assert msw.total == count.total
        # SmolLM3 has no q/k norm: its backbone costs less to begin with
        theirs = per_layer(lambda layers: backbone(layers, "smollm3"), batch).total
        assert per_layer(lambda layers: patched(layers, "triton", family="smollm3"), batch).total <= theirs


def test_numba_loops():
    pytest.importorskip("numba")

    def model(layers):
        return patch_model(tiny_model(num_hidden_layers=layers), backend="numba")

    count = per_layer(model)
    assert count.total <= STRETCH and set(count.launches) == {"steer_rows"}, count


def test_the_generic_path_is_counted_too():
    with triton_without_device():
        count = per_layer(lambda layers: force_generic(patched(layers, "triton")))
    assert count.launches == {"step_kernel": 1, "steer_kernel": 2} and LIMIT < count.total < 70
