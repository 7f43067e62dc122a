"""The released implementation's numbers, on every backend that runs on a CPU, under eager and SDPA attention."""

import pytest
import torch
from support import CASES, GOLDEN, golden_case, golden_model, relative_error
from transformers import DynamicCache

from deltamem_fast import MemoryState, memory_state, patch_model
from deltamem_kernels.dispatch import interpreting

# Triton's interpreter needs a process of its own: tests/kernels/test_golden_interpreted.py starts it.
BACKENDS = ("triton",) if interpreting() else ("reference", "numba")


def tolerance(case, kind):
    if case.get("dtype") == "bfloat16":
        return {"logits": 5e-2, "state": 3e-2}[kind]
    return {"logits": 1e-5, "state": 1e-5, "grad": 1e-4}[kind]


def segment_ids(case, tensors):
    if "sentence_ids" in tensors and case["delta"].get("memory_write_granularity") == "sentence_mean":
        return torch.where(tensors["message_ids"] >= 0, tensors["sentence_ids"], -1)
    if case["delta"].get("memory_write_granularity") == "message_mean":
        return tensors["message_ids"]
    return None


def patched(name, attention, backend):
    case, tensors = golden_case(name)
    return case, tensors, patch_model(golden_model(case, attention), GOLDEN / name / "adapter", backend=backend)


def check_states(case, tensors, prefix, memory):
    names = [key for key in tensors if key.startswith(prefix)]
    assert len(names) == len(memory)
    for key in names:
        ours = memory[int(key.removeprefix(prefix))]
        assert ours.dtype == torch.float32
        theirs = tensors[key].reshape(ours.shape)
        assert relative_error(ours, theirs) < tolerance(case, "state"), key


def check_logits(case, ours, theirs, mask=None):
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    assert relative_error(ours, theirs) < tolerance(case, "logits")


def run_inference(name, attention, backend):
    case, tensors, model = patched(name, attention, backend)
    prompt, steps = case["prompt"], case.get("decode", 0)
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(
            ids[:, :prompt],
            attention_mask=None if mask is None else mask[:, :prompt],
            past_key_values=cache,
            segment_ids=segment_ids(case, tensors),
        )
        real = None if mask is None else mask[:, :prompt].bool()
        check_logits(case, out.logits, tensors["logits_prefill"], real)
        check_states(case, tensors, "state_prefill.", memory_state(cache))
        carried = memory_state(cache).clone()
        position, width, decoded = prompt, case.get("step", 1), []
        while position < prompt + steps:
            seen = None if mask is None else mask[:, : position + width]
            decoded.append(
                model(ids[:, position : position + width], attention_mask=seen, past_key_values=cache).logits
            )
            position += width
        if decoded:
            check_logits(case, torch.cat(decoded, 1), tensors["logits_decode"])
            check_states(case, tensors, "state_final.", memory_state(cache))
        if "logits_carry" in tensors:
            carried.frozen = True
            out = model(tensors["carry_input_ids"], memory=carried, use_cache=False)
            check_logits(case, out.logits, tensors["logits_carry"])


def run_gradients(name, attention, backend):
    case, tensors, model = patched(name, attention, backend)
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask")
    memory = MemoryState.zeros(model, batch_size=ids.shape[0])
    logits = model(ids, attention_mask=mask, memory=memory, use_cache=False).logits
    check_logits(case, logits, tensors["logits"], None if mask is None else mask.bool())
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    pairs = real[:, :-1] & real[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][pairs], ids[:, 1:][pairs])
    loss = loss + 0.01 * sum(state.square().sum() for _, state in memory.items())
    assert abs(loss.item() - tensors["loss"].item()) < 1e-5 * abs(tensors["loss"].item())
    loss.backward()
    check_states(case, tensors, "state.", memory)
    wanted = {key for key in tensors if key.startswith("grad.")}
    found = set()
    for layer, adapter in ((m.layer_idx, m) for m in model.modules() if hasattr(m, "memory_q_proj")):
        for key, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                found.add(f"grad.{layer}.{key}")
                theirs = tensors[f"grad.{layer}.{key}"]
                assert relative_error(parameter.grad, theirs) < tolerance(case, "grad"), (layer, key)
    assert found == wanted


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("name", CASES)
def test_golden(name, attention, backend):
    case, _ = golden_case(name)
    (run_gradients if case.get("grad") else run_inference)(name, attention, backend)


def test_all_cases_are_vendored():
    assert len(CASES) == 13
