"""A patched model on the Triton backend, in the interpreter: eager, compiled, and against the reference."""

import sys
from pathlib import Path

import torch
from transformers import DynamicCache, StaticCache

from deltamem_fast import DeltaMemConfig, memory_state, patch_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import loud_adapter, relative_error, tiny_model

IDS = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(7))


def patched(backend, config=None):
    return loud_adapter(patch_model(tiny_model(num_hidden_layers=1), config or DeltaMemConfig(rank=4), backend=backend))


@torch.no_grad()
def test_compiled_decode_is_one_graph():
    model, reference = patched("triton"), patched("reference")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = StaticCache(config=model.config, max_cache_len=8), DynamicCache(config=model.config)
    model(IDS[:, :4], past_key_values=ours)
    reference(IDS[:, :4], past_key_values=theirs)
    torch._dynamo.utils.counters.clear()
    for t in (4, 5, 6):
        out = compiled(IDS[:, t : t + 1], past_key_values=ours).logits
        assert relative_error(out, reference(IDS[:, t : t + 1], past_key_values=theirs).logits) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert relative_error(memory_state(ours)[0], memory_state(theirs)[0]) < 1e-5


@torch.no_grad()
def test_generate_and_segments():
    for config in (DeltaMemConfig(rank=3, delta_heads=("q", "k", "v", "o")), DeltaMemConfig.ssw(rank=4)):
        out = []
        for backend in ("triton", "reference"):
            model = patched(backend, config)
            arguments = {"segment_ids": torch.tensor([[0, 0, 0, 1, 1, -1, -1]] * 2)} if config.segmented else {}
            out.append(model.generate(IDS, max_new_tokens=3, do_sample=False, **arguments))
        assert torch.equal(*out)
