import dataclasses
import json

import pytest
from support import CASES, GOLDEN

from deltamem_fast import DeltaMemConfig
from deltamem_fast.config import ARCHIVED, CONFIG_NAME
from deltamem_fast.errors import ArgumentTypeError


@pytest.mark.parametrize("name", CASES)
def test_released_configuration_round_trips(name, tmp_path):
    source = json.loads((GOLDEN / name / "adapter" / CONFIG_NAME).read_text())
    config = DeltaMemConfig.load(GOLDEN / name / "adapter")
    config.save(tmp_path, released=True)
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == source
    assert DeltaMemConfig.load(tmp_path) == config


def test_ours_has_a_format_version_and_round_trips(tmp_path):
    config = DeltaMemConfig.msw(heads=3, rank=4, delta_heads=("o",), target_layers=(0, 2))
    config.save(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["format_version"] == 1
    assert DeltaMemConfig.load(tmp_path) == config


def test_default_is_the_released_recipe():
    assert DeltaMemConfig() == DeltaMemConfig.load(GOLDEN / "qwen3_tsw" / "adapter")


def test_keys_are_frozen():
    # a new or renamed key is a new format version
    fields = {f.name for f in dataclasses.fields(DeltaMemConfig)} - {"archived"}
    released = json.loads((GOLDEN / "qwen3_tsw" / "adapter" / CONFIG_NAME).read_text())
    assert fields | set(ARCHIVED) == set(released)


def test_a_released_file_without_a_key_means_the_released_default():
    config = DeltaMemConfig.from_dict({"rank": 4})
    assert config.delta_heads == ("q", "k", "v", "o") and config.output_init == "zero"
    assert DeltaMemConfig.from_dict({"rank": 4, "format_version": 1}).delta_heads == ("q", "o")


def test_archived_keys_are_kept():
    assert DeltaMemConfig.from_dict({"latent_memory_slots": 4}).archived == {"latent_memory_slots": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank: got 0, allowed an integer, 1 to 64"),
        ({"rank": 65}, "rank: got 65"),
        ({"rank": 8.0}, "rank: got 8.0, allowed an integer"),
        ({"rank": True}, "rank: got True"),
        ({"state_update_mode": "gated"}, "state_update_mode: got 'gated', allowed standard, lambda_outside, no_lambda"),
        ({"memory_write_granularity": "message_proposals"}, "memory_write_granularity: got 'message_proposals'"),
        ({"slot_read_top_k": 3}, "slot_read_top_k: archived, got 3, allowed its default 0 only"),
        ({"memory_reader_layers": [1]}, "memory_reader_layers: archived"),
        ({"memory_reader_read_only": 1}, "memory_reader_read_only: archived"),
        ({"rnak": 8}, "rnak: unknown configuration key"),
        ({"delta_heads": ["x"]}, "delta_heads: got 'x', allowed q, k, v, o"),
        ({"delta_heads": "qo"}, "delta_heads: got 'qo', allowed a list"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"num_state_heads": 0}, "num_state_heads: got 0, allowed an integer, 1 to 64"),
        ({"num_state_heads": 65}, "num_state_heads: got 65, allowed an integer, 1 to 64"),
        ({"num_state_heads": 10**400}, "num_state_heads: got an integer of many digits"),
        ({"rank": 10**5000}, "rank: got an integer of many digits"),
        ({"alpha": 10**400}, "alpha: got 1000"),
        ({"alpha": 1e39}, "alpha: got 1e.39, allowed a finite number that float32 can hold"),
        ({"target_layers": list(range(10**6))}, "target_layers: got (0, 1, 2"),
        ({"target_layers": [10**400]}, "target_layers: got 1000"),
        ({"target_layers": [True]}, "target_layers: got .True., allowed a list of int"),
        ({"target_modules": ["x"] * 65}, "target_modules: got ('x'"),
        ({"latent_memory_layers": list(range(10**6))}, "latent_memory_layers: archived, got .0, 1"),
        ({"x" * 10**6: 1}, "x{200}: unknown configuration key"),
        ({"delta_scale_init": 3.0}, "delta_scale_init: got 3.0, allowed between 0 and 2.0"),
        ({"normalize_qk": "yes"}, "normalize_qk: got 'yes', allowed true or false"),
        ({"format_version": 2}, "format_version: got 2"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        DeltaMemConfig.from_dict(values)


def test_messages_are_short_and_other_types_are_named():
    with pytest.raises(ValueError) as caught:
        DeltaMemConfig.from_dict({"target_layers": list(range(10**6))})
    assert len(str(caught.value)) < 400
    with pytest.raises(TypeError, match="values: got list, allowed a dict"):
        DeltaMemConfig.from_dict([1])


def test_a_large_file_is_not_read(tmp_path):
    (tmp_path / CONFIG_NAME).write_text(" " * 2**20 + "{}")
    with pytest.raises(ValueError, match=f"{CONFIG_NAME}: has 1,048,578 bytes, allowed at most 1,048,576"):
        DeltaMemConfig.load(tmp_path)


def test_presets():
    assert DeltaMemConfig.preset("tsw") == DeltaMemConfig()
    assert DeltaMemConfig.preset("ssw").memory_write_granularity == "message_mean"
    assert DeltaMemConfig.ssw("sentence_mean", rank=4).rank == 4
    assert DeltaMemConfig.preset("msw").num_state_heads == 4
    with pytest.raises(ValueError, match="preset: got 'xsw', allowed tsw, ssw, msw"):
        DeltaMemConfig.preset("xsw")


def test_what_can_be_no_directory():
    for call in (DeltaMemConfig.load, DeltaMemConfig().save):
        with pytest.raises(ArgumentTypeError, match="directory: got NoneType, allowed a path"):
            call(None)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        DeltaMemConfig.load(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(ValueError, match=f"{CONFIG_NAME}: not JSON"):
        DeltaMemConfig.load(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"rank": 0}')
    with pytest.raises(ValueError, match=f"{CONFIG_NAME}: rank: got 0"):
        DeltaMemConfig.load(tmp_path)
