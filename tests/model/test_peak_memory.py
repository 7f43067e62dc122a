"""What a memory costs in memory: the peak of a long prefill, and no logits that nobody asked for."""

import torch
from support import loud_adapter, tiny_model
from torch.profiler import ProfilerActivity, profile

from deltamem_fast import MemoryState, patch_model

SIZES = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192,
}  # fmt: skip


@torch.no_grad()
def peak_bytes(model, ids) -> int:
    """Most bytes that PyTorch holds at once during a prefill, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        model(ids, logits_to_keep=1)
    live = top = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top


def test_the_peak_of_a_prefill_is_the_backbones():
    ids = torch.randint(3, 128, (1, 4096))
    model = tiny_model(**SIZES)
    peak_bytes(model, ids[:, :16])  # what is made once is made now
    bare = peak_bytes(model, ids)
    loud_adapter(patch_model(model))
    peak_bytes(model, ids[:, :16])
    assert bare > 4096 * 3 * 1024 * 4
    assert peak_bytes(model, ids) <= 1.01 * bare


def test_generate_asks_for_the_last_logits_alone():
    model = loud_adapter(patch_model(tiny_model()))
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    model.generate(torch.randint(3, 128, (1, 50)), memory=MemoryState.zeros(model), max_new_tokens=3, eos_token_id=None)
    assert seen == [1, 1, 1]
