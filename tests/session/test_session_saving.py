"""Sessions on disk: the same answers afterwards, to the bit; nothing that can run code; damage is seen."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from session_support import CONFIGS, cache_bits, everything, says, state_bits, tiny_session
from support import loud_adapter, relative_error, tiny_model
from tokenizers_for_tests import chatml_tokenizer, mode_tokenizer, thinking_tokenizer

from deltamem_fast import MemorySession, patch_model, unpatch_model
from deltamem_fast.storage import snapshots
from deltamem_fast.storage.files import read_json

TALK = ("My dog is called Rex. He is old.", "Where did Ada go?", "She took the train; then she went home.", "And then?")
SETTINGS = ({}, {"context_turns": 2}, {"context_tokens": 60}, {"system": "You are kind.", "context_turns": 2})


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("strategy", ("tsw", "ssw", "msw"))
def test_it_goes_on_as_if_it_had_not_stopped(tmp_path, strategy, settings):
    session = tiny_session(chatml_tokenizer(), strategy, **settings)
    for text in TALK:
        expected = everything(session)
        saved = MemorySession.load(session.save(tmp_path / "saved"), session.model, session.tokenizer)
        replayed = MemorySession.load(session.save(tmp_path / "small", cache=False), session.model, session.tokenizer)
        assert everything(saved) == expected
        assert replayed._now.cache is None and everything(replayed)[:-1] == expected[:-1]
        reply = session.answer(text, max_new_tokens=6)
        assert [s.answer(text, max_new_tokens=6) for s in (saved, replayed)] == [reply, reply]
        assert everything(saved) == everything(replayed) == everything(session)
    assert (saved.system, saved.limits, saved.template, saved.generation) == (
        session.system, session.limits, session.template, session.generation,
    )  # fmt: skip


def test_replayed_keys_and_values_are_those_of_earlier_memories(tmp_path):
    """Computed under the memory as it is now, they would be others."""
    session = tiny_session(chatml_tokenizer(), "tsw", context_turns=3)
    for text in TALK:
        session.answer(text, max_new_tokens=6)
    replayed = MemorySession.load(session.save(tmp_path, cache=False), session.model, session.tokenizer)
    # A failing turn builds the cache, and goes no further.
    replayed.limit_context(turns=4)
    now = replayed._now
    from deltamem_fast.session.turns import build

    cache = build(session.model, now.preamble, now.turns, now.memory, written=now.written)
    ours = [(layer.keys.numpy().tobytes(), layer.values.numpy().tobytes()) for layer in cache.layers]
    assert ours == cache_bits(session)
    late = tuple(type(turn)(turn.messages, turn.prompt, turn.answer, now.memory) for turn in now.turns)
    wrong = build(session.model, now.preamble, late, now.memory, written=now.written)
    assert wrong.layers[1].keys.numpy().tobytes() != ours[1][0]


@pytest.mark.parametrize("change", ("ingest", "forget", "zero", "off"))
def test_replay_holds_whatever_happened_between_turns(tmp_path, change):
    session = tiny_session(chatml_tokenizer(), "tsw", context_turns=4)
    session.answer(TALK[0], max_new_tokens=4)
    if change == "ingest":
        session.ingest("The train came late. Ada waited.")
    elif change == "forget":
        session.forget(TALK[0])
    elif change == "zero":
        session.memory.zero_()
    else:
        session.remembers = False
    session.answer(TALK[1], max_new_tokens=4)
    session.remembers = True
    session.answer(TALK[2], max_new_tokens=4)
    replayed = MemorySession.load(session.save(tmp_path, cache=False), session.model, session.tokenizer)
    assert session.answer(TALK[3], max_new_tokens=6) == replayed.answer(TALK[3], max_new_tokens=6)
    assert everything(session) == everything(replayed)


@pytest.mark.parametrize("tokenizer", (thinking_tokenizer, mode_tokenizer))
def test_thinking_models(tmp_path, tokenizer):
    session = tiny_session(tokenizer(), "msw", context_turns=2, template={"enable_thinking": True})
    thought = says(session.tokenizer, "<think>\nThe train?\n</think>\n\nShe went home.")
    session.answer(TALK[0], **thought)
    again = MemorySession.load(session.save(tmp_path), session.model, session.tokenizer)
    assert again.template == {"enable_thinking": True} and again.messages == session.messages
    assert session.answer(TALK[1], max_new_tokens=6) == again.answer(TALK[1], max_new_tokens=6)
    assert everything(session) == everything(again)


def test_sliding_windows(tmp_path):
    session = tiny_session(chatml_tokenizer(), "tsw", "mistral", context_turns=3)
    for text in TALK[:3]:
        session.answer(text, max_new_tokens=6)
    again = MemorySession.load(session.save(tmp_path), session.model, session.tokenizer)
    assert everything(again) == everything(session)
    assert session.answer(TALK[3], max_new_tokens=6) == again.answer(TALK[3], max_new_tokens=6)
    assert everything(again) == everything(session)


def test_layers_that_hold_states_go_back_and_are_computed_again(tmp_path):
    """Linear attention writes its states in place: a mark of the cache keeps them, and a file leaves the cache out."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    tokenizer = chatml_tokenizer()
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1],
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = patch_model(AutoModelForCausalLM.from_config(config).eval(), CONFIGS["tsw"], backend="reference")
    session = MemorySession(loud_adapter(model), tokenizer)
    session.answer(TALK[0], max_new_tokens=4)
    kept = session.snapshot()
    again = MemorySession.load(session.save(tmp_path), model, tokenizer)
    assert again._now.cache is None
    for _ in range(2):
        reply, expected = session.answer(TALK[1], max_new_tokens=4), session.memory[1]
        session.restore(kept)
    assert again.answer(TALK[1], max_new_tokens=4) == reply == session.answer(TALK[1], max_new_tokens=4)
    assert max(relative_error(found.memory[1], expected) for found in (again, session)) < 1e-5


def test_bfloat16_and_a_load_in_another_dtype(tmp_path):
    session = tiny_session(chatml_tokenizer(), "tsw", context_turns=3)
    session.model.to(torch.bfloat16)
    session = MemorySession(session.model, session.tokenizer, context_turns=3)
    for text in TALK[:3]:
        session.answer(text, max_new_tokens=6)
    session.save(tmp_path)
    again = MemorySession.load(tmp_path, session.model, session.tokenizer)
    assert [layer.keys.dtype for layer in again._now.cache.layers] == [torch.bfloat16] * 2
    assert session.answer(TALK[3], max_new_tokens=6) == again.answer(TALK[3], max_new_tokens=6)
    assert state_bits(session.memory) == state_bits(again.memory)
    session.model.float()
    wide = MemorySession.load(tmp_path, session.model, session.tokenizer)
    assert wide._now.cache is None  # those keys and values are of another dtype: computed again
    wide.answer(TALK[3], max_new_tokens=6)


def test_a_memory_frozen_or_switched_off_stays_so(tmp_path):
    session = tiny_session(chatml_tokenizer())
    session.answer(TALK[0], max_new_tokens=4)
    session.memory.frozen = True
    session.remembers = False
    again = MemorySession.load(session.save(tmp_path), session.model, session.tokenizer)
    assert again.memory.frozen and not again.remembers


def test_only_json_and_safetensors(tmp_path):
    session = tiny_session(chatml_tokenizer(), context_turns=2)
    session.answer(TALK[0], max_new_tokens=4)
    session.save(tmp_path)
    session.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if not name.endswith(".safetensors")] == [".lock", "session.json"]
    assert len(names) == 3 and (tmp_path / ".lock").stat().st_size == 0
    manifest = read_json(tmp_path / "session.json")
    assert manifest["generation"] == 2 and manifest["messages"] == session.messages
    assert set(manifest["identity"]) == {
        "adapter_fingerprint", "adapter_name", "backbone_fields", "backbone_fingerprint", "backbone_fingerprint_1",
        "backbone_name",
    }  # fmt: skip
    with safe_open(tmp_path / manifest["files"]["state"]["name"], "pt") as file:
        assert {"memory.0", "skipped", "cache.0.keys", "cache.1.values"} <= set(file.keys())


def test_a_snapshot_without_the_cache_is_small(tmp_path):
    session = tiny_session(chatml_tokenizer())
    for text in TALK:
        session.answer(text, max_new_tokens=6)
    sizes = []
    for cache in (True, False):
        session.save(tmp_path, cache=cache)
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
    memories = 5 * 2 * 8 * 8 * 4
    assert sizes[1] < memories + 12_000 < sizes[0]


def test_other_adapters_backbones_and_formats_are_refused(tmp_path):
    session = tiny_session(chatml_tokenizer())
    session.answer(TALK[0], max_new_tokens=4)
    session.save(tmp_path)
    tokenizer, model = session.tokenizer, session.model
    other = tiny_session(tokenizer, "msw")
    with pytest.raises(ValueError, match=r"directory: .*: saved under adapter .*, but the model's adapter is"):
        MemorySession.load(tmp_path, other.model, tokenizer)
    larger = patch_model(tiny_model(vocab_size=len(tokenizer)))
    with pytest.raises(ValueError, match=r"saved under backbone .*, but the model's backbone is"):
        MemorySession.load(tmp_path, larger, tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no snapshot there \(no session.json\)"):
        MemorySession.load(tmp_path / "nothing", model, tokenizer)
    unpatch_model(other.model)
    with pytest.raises(ValueError, match="not patched"):
        MemorySession.load(tmp_path, other.model, tokenizer)
    manifest = read_json(tmp_path / "session.json")
    for change, text in (
        ({"format": "other"}, "not a snapshot"),
        ({"format_version": 4}, "format version 4, this version reads 1 to 3"),
        ({"files": {"state": manifest["files"]["state"] | {"name": "../x.safetensors"}}}, "damaged"),
    ):
        (tmp_path / "session.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=text):
            MemorySession.load(tmp_path, model, tokenizer)
    (tmp_path / "session.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        MemorySession.load(tmp_path, model, tokenizer)


@pytest.mark.parametrize("damage", ("cut", "flipped", "gone"))
def test_damage_is_seen(tmp_path, damage):
    session = tiny_session(chatml_tokenizer())
    session.answer(TALK[0], max_new_tokens=4)
    session.save(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[-5] ^= 1
        path.write_bytes(data if damage == "flipped" else data[:-9])
    with pytest.raises(ValueError, match="damaged"):
        MemorySession.load(tmp_path, session.model, session.tokenizer)


def test_what_cannot_be_saved_leaves_the_earlier_snapshot(tmp_path):
    session = tiny_session(chatml_tokenizer())
    session.answer(TALK[0], max_new_tokens=4)
    session.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    session.answer(TALK[1], max_new_tokens=4)
    session.generation["stopping_criteria"] = object()
    with pytest.raises(TypeError, match="must be JSON to be saved"):
        session.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="which is a file"):
        session.save(tmp_path / "session.json")


def test_an_error_while_writing_leaves_the_earlier_snapshot(tmp_path, monkeypatch):
    session = tiny_session(chatml_tokenizer())
    session.save(tmp_path)
    session.answer(TALK[0], max_new_tokens=4)
    replace, calls = os.replace, []

    def fails(source, target):
        calls.append(target)
        if str(target).endswith("session.json"):
            raise OSError("no space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        session.save(tmp_path)
    monkeypatch.undo()
    assert MemorySession.load(tmp_path, session.model, session.tokenizer).turns == 0
    session.save(tmp_path)  # and what it left behind goes
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and not list(tmp_path.glob(".*.tmp"))


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-00001.safetensors").write_text("mine, too")
    session = tiny_session(chatml_tokenizer())
    session.save(tmp_path)
    session.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "model-00001.safetensors").exists()
    (tmp_path / "session.json").write_text('{"format": "somebody else"}')
    with pytest.raises(ValueError, match="of another format"):
        session.save(tmp_path)


def test_importing_the_storage_takes_neither_torch_nor_transformers(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from deltamem_fast.storage import snapshots;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'safetensors') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert found.stdout.strip() == "[]", found.stderr
    assert snapshots.MANIFEST == "session.json"
