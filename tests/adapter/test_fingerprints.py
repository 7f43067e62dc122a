"""Fingerprints of backbones: frozen, the same under every version of transformers; names without paths."""

import json

import pytest
import transformers
from support import tiny_model

from deltamem_fast.adapter.fingerprints import (
    backbone_fields,
    backbone_fingerprint,
    backbone_name,
    differing_fields,
    public_label,
    public_name,
)
from deltamem_fast.adapter.identity import describe_difference

TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1000000}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
# Digests that transformers 5.10.1, 5.10.4, 5.13.1, 5.16.1, 5.19.0, 5.21.1, 5.23.0 and 5.24.0 give. A change of one
# locks users out of their memories: give the files a new format version, and go on reading the old ones.
FROZEN = (
    ("Qwen3Config", {}, "89604da44c21"),
    ("SmolLM3Config", {}, "5c6b397ad75f"),
    ("LlamaConfig", {}, "673075035364"),
    ("MistralConfig", {}, "3ef75f494fef"),
    ("Qwen2Config", {}, "c46e5f7a54c4"),
    (
        "Qwen3Config",
        TINY | {"head_dim": 16, "rope_theta": 1e6, "attention_bias": True, "use_sliding_window": True,
                "sliding_window": 32, "max_window_layers": 2},
        "5b1decb1a0f8",
    ),
    ("Qwen3Config", TINY | {"head_dim": 16, "rope_parameters": YARN}, "fc258959f690"),
    ("SmolLM3Config", TINY | {"no_rope_layers": [1, 1, 0, 1], "rope_theta": 5e6, "mlp_bias": True}, "120e5a35d542"),
    ("LlamaConfig", TINY | {"rope_theta": 500000, "rope_scaling": LLAMA3}, "56e5d7007ff1"),
    ("LlamaConfig", TINY | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "f6aea578825d"),
    ("MistralConfig", TINY | {"sliding_window": None, "head_dim": 32}, "3e4301992d0f"),
    ("Qwen2Config", TINY | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16}, "bfea36a59987"),
    # By the rule for every other type.
    ("Gemma3TextConfig", {}, "5a77b9a88de9"),
    ("Gemma3Config", {}, "5a77b9a88de9"),  # its text's
    ("Qwen3MoeConfig", {}, "9f4fabdbf865"),
    ("MixtralConfig", {}, "dea339bc653b"),
    ("Phi3Config", {}, "1537357d3fbc"),
    ("GraniteConfig", {}, "e4b1e3cdb13f"),
    ("Glm4Config", {}, "2a0c903d1430"),
    ("GptOssConfig", {}, "31a15b28ea03"),
    ("DeepseekV3Config", {}, "aedb896939dd"),
    ("Qwen3NextConfig", {}, "f58ad79ebfc7"),
    ("Gemma4TextConfig", {}, "115b7206a9ae"),
    ("Gemma4TextConfig", {"num_hidden_layers": 6, "global_head_dim": 64, "num_global_key_value_heads": 1,
                          "attention_k_eq_v": True}, "4bfe45c2efc6"),
    ("Olmo3Config", {"rope_theta": 500000.0}, "e99ef5d894f0"),
    ("LagunaConfig", {}, "42cda12119af"),
)  # fmt: skip


def of(name, **values):
    return backbone_fields(getattr(transformers, name)(**values))


@pytest.mark.parametrize(("name", "values", "digest"), FROZEN)
def test_the_same_in_every_version(name, values, digest):
    fields = of(name, **values)
    assert backbone_fingerprint(fields)[:12] == digest, json.dumps(fields)
    assert json.loads(json.dumps(fields)) == fields


IRRELEVANT = (
    {"vocab_size": 999}, {"pad_token_id": 3}, {"eos_token_id": [1, 2]}, {"bos_token_id": 7}, {"attention_dropout": 0.5},
    {"initializer_range": 1.0}, {"tie_word_embeddings": True}, {"use_cache": False}, {"dtype": "bfloat16"},
    {"max_position_embeddings": 99999}, {"architectures": ["X"]}, {"id2label": {0: "a"}}, {"_name_or_path": "there"},
    {"quantization_config": {"bits": 4}}, {"attn_implementation": "eager"}, {"some_token_id": 5},
)  # fmt: skip


@pytest.mark.parametrize("name", ("Qwen3Config", "SmolLM3Config", "LlamaConfig", "MistralConfig", "Gemma3TextConfig"))
@pytest.mark.parametrize("values", IRRELEVANT, ids=lambda values: next(iter(values)))
def test_what_hidden_states_do_not_depend_on(name, values):
    assert of(name, **TINY | values) == of(name, **TINY)


RELEVANT = (
    {"hidden_size": 128}, {"intermediate_size": 100}, {"num_hidden_layers": 5}, {"num_attention_heads": 8},
    {"num_key_value_heads": 4}, {"rms_norm_eps": 1e-4}, {"rope_theta": 77.0}, {"head_dim": 8},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
)  # fmt: skip


@pytest.mark.parametrize("name", ("Qwen3Config", "SmolLM3Config", "LlamaConfig", "MistralConfig", "Olmo2Config"))
@pytest.mark.parametrize("values", RELEVANT, ids=lambda values: next(iter(values)))
def test_what_hidden_states_depend_on(name, values):
    assert of(name, **TINY | values) != of(name, **TINY)


def test_rope_that_depends_on_the_length():
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    assert of("LlamaConfig", **TINY | dynamic) != of("LlamaConfig", **TINY | dynamic | {"max_position_embeddings": 64})


def test_a_configuration_that_is_not_from_transformers():
    class Custom(transformers.LlamaConfig):
        gate: float = 1.5

    config = Custom(**TINY)
    assert backbone_fields(config)["gate"] == 1.5 and "vocab_size" not in backbone_fields(config)


def test_a_resized_vocabulary():
    model = tiny_model()
    before = backbone_fields(model.config)
    model.resize_token_embeddings(160)
    assert backbone_fields(model.config) == before


def test_the_difference_in_words():
    theirs, ours = of("LlamaConfig", **TINY), of("LlamaConfig", **TINY | {"hidden_size": 128, "mlp_bias": True})
    text = differing_fields(theirs, ours)
    assert "hidden_size 64 (the model's: 128)" in text and "mlp_bias null (the model's: true)" in text
    many = dict.fromkeys("abcdefg", 1)
    assert differing_fields(many, {}).endswith("and 3 more") and "..." in differing_fields({"a": "x" * 999}, {})
    ours = {"backbone_fingerprint": "a", "backbone_name": "b", "backbone_fields": "{}"}
    for broken in ("{", "[]", "5", "null", None, 7):  # a file may say anything
        assert "only a fingerprint" in describe_difference({"backbone_fields": broken}, ours)
    assert "None" in describe_difference({}, ours) and describe_difference({"backbone_fingerprint": 5}, ours)


@pytest.mark.parametrize(
    ("given", "shown"),
    (
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("gpt2", "gpt2"),
        ("a fresh adapter", "a fresh adapter"),
        ("/home/ada/models/qwen", "qwen"),
        ("/home/ada/models/qwen/", "qwen"),
        ("~/models/qwen", "qwen"),
        ("../qwen", "qwen"),
        ("runs/seven/adapter", "adapter"),
        (r"C:\Users\ada\qwen", "qwen"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/0123abc", "Qwen/Qwen3-4B"),
        ("https://example.org/x/adapter", "adapter"),
    ),
)
def test_names_without_paths(given, shown):
    assert public_name(given) == shown == public_label(given)
    label = f"{given} (qwen3, 36 layers, hidden 2560)"
    assert public_label(label) == f"{shown} (qwen3, 36 layers, hidden 2560)"
    config = transformers.Qwen3Config(num_hidden_layers=36, hidden_size=2560)
    config._name_or_path = given
    assert backbone_name(config) == public_label(label)


def test_a_directory_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "adapter").mkdir(parents=True)
    assert public_name("private/adapter") == "adapter" and public_name("org/adapter") == "org/adapter"
    assert public_name(".") == tmp_path.name and "(gemma3_text, 26 layers" in backbone_name(transformers.Gemma3Config())


def test_a_training_run_that_was_written_with_a_path_goes_on(tmp_path):
    from deltamem_fast.training.checkpoints import Run

    run = Run("qwen (qwen3, 3 layers, hidden 64)", "float32", {}, "0", 1, {})
    Run("/home/ada/qwen (qwen3, 3 layers, hidden 64)", "float32", {}, "0", 1, {}).save(tmp_path)
    run.check(tmp_path)
    Run("/home/ada/llama (llama, 3 layers, hidden 64)", "float32", {}, "0", 1, {}).save(tmp_path)
    with pytest.raises(ValueError, match=r"model 'llama \(llama"):
        run.check(tmp_path)
