"""torch.set_default_dtype and torch.set_default_device change nothing: every tensor says its own."""

import contextlib

import pytest
import torch
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer

import deltamem_fast
from deltamem_fast import DeltaMemConfig, MemoryBank, MemorySession, MemoryState, patch_model, unpatch_model
from deltamem_fast.inspection.trace import trace
from deltamem_kernels.dispatch import installed

CASES = [("ssw", "reference")] + [("tsw", "numba")] * installed("numba")
IDS = torch.arange(5, 25)[None]
TWO, SEGMENTS = IDS.repeat(2, 1), (torch.arange(20) // 5)[None]


@contextlib.contextmanager
def defaults(dtype=torch.float32, device=None):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def everything(strategy, backend, directory):
    """What is made and written on the way, by name; the model and its inputs are there already."""
    tokenizer = chatml_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer) + 8)
    patch_model(model, DeltaMemConfig.preset(strategy), backend=backend)
    loud_adapter(model)
    found = {}

    def keep(name, value):
        tensors = dict(value.items()) if isinstance(value, MemoryState) else {0: value}
        found.update(
            {(name, i): (t.dtype, t.device.type, t.detach().double().sum().item()) for i, t in tensors.items()}
        )

    def use():
        memory = MemoryState.zeros(model)
        given = {"segment_ids": SEGMENTS} if strategy == "ssw" else {}
        with torch.no_grad():
            keep("logits", model(IDS, memory=memory, **given).logits)
            keep("decoded", model(IDS[:, :1], memory=memory).logits)
            keep("generated", model.generate(IDS, memory=memory, max_new_tokens=3, do_sample=False))
            model(IDS, use_cache=False, cu_seq_lens_q=SEGMENTS.new_tensor([0, 5, 20]).int())
        deltamem_fast.ingest(model, tokenizer, memory, "Some text. And more.")
        deltamem_fast.forget(model, tokenizer, memory, "Some text.")
        deltamem_fast.revise(model, tokenizer, memory, "Another text.")
        keep("memory", memory)
        keep("loaded", MemoryState.load(memory.save(directory / "memory"), model))
        both = MemoryState.cat([memory, memory.select([0])]).to("cpu")
        keep("decayed", both.repeat(2).select([3, 1]).decay(0.1))
        keep("skipped", both.skipped)
        assert str(both.report())
        session = MemorySession(model, tokenizer)
        session.answer("Hi.", max_new_tokens=2, do_sample=False)
        session.save(directory / "session")
        keep("session", MemorySession.load(directory / "session", model, tokenizer).memory)
        bank = MemoryBank(directory / "bank", model)
        rows = bank.gather(["a", "b"])
        with torch.no_grad():
            model(TWO, memory=rows)
        bank.commit(["a", "b"], rows)
        keep("bank", bank.gather(["b"]))
        with deltamem_fast.record_gates() as gates, torch.no_grad():
            model(IDS, memory=memory, **given)
        keep("gates", gates.penalty())
        assert gates.statistics() and trace(model, tokenizer, "Some text", memory)
        model(IDS, use_cache=False, memory=MemoryState.zeros(model), **given).logits.square().mean().backward()
        keep("gradient", model.model.layers[0].self_attn.delta_memory.memory_v_proj.grad)
        deltamem_fast.save_adapter(model, directory / "adapter")
        deltamem_fast.load_adapter(model, directory / "adapter")
        patch_model(unpatch_model(model), directory / "adapter", backend=backend)
        keep("adapter", model.model.layers[0].self_attn.delta_memory.memory_v_proj)

    return use, found


@pytest.mark.parametrize(("strategy", "backend"), CASES)
def test_defaults_of_torch_change_nothing(strategy, backend, tmp_path):
    results = []
    settings = ({}, {"dtype": torch.float64}, {"dtype": torch.bfloat16, "device": "meta"})
    for place, setting in enumerate(settings):
        use, found = everything(strategy, backend, tmp_path / str(place))
        with defaults(**setting):
            use()
        results.append(found)
    assert results[0]["memory", 0][0] == torch.float32
    for setting, found in zip(settings, results):
        assert found == results[0], setting
