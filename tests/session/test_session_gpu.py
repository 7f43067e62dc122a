"""Sessions on a CUDA device: saved, replayed, forgotten, as on a CPU."""

import pytest
import torch
from session_support import CONFIGS
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import MemorySession, patch_model

TALK = ("My dog is called Rex. He is old.", "Where did Ada go?", "She took the train; then she went home.", "And then?")


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ("tsw", "ssw", "msw"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_saved_and_replayed_sessions_go_on_alike(tmp_path, strategy, dtype):
    tokenizer = chatml_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(vocab_size=len(tokenizer), dtype=dtype, **special).cuda()
    loud_adapter(patch_model(model, CONFIGS[strategy]))
    session = MemorySession(model, tokenizer, context_turns=2)
    for text in TALK:
        saved = MemorySession.load(session.save(tmp_path / "saved"), model, tokenizer)
        replayed = MemorySession.load(session.save(tmp_path / "small", cache=False), model, tokenizer)
        reply = session.answer(text, max_new_tokens=8)
        assert saved.answer(text, max_new_tokens=8) == replayed.answer(text, max_new_tokens=8) == reply
        for layer, state in session.memory.items():
            assert state.is_cuda and torch.equal(saved.memory[layer], state)
            assert torch.equal(replayed.memory[layer], state)
    before = {layer: float(state.norm()) for layer, state in session.memory.items()}
    session.forget(TALK[0])
    assert all(float(state.norm()) < before[layer] for layer, state in session.memory.items())
    assert session.retrieve("Where?", max_new_tokens=4) is not None
