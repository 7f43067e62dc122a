"""Uploading an adapter, and what a card says of where things came from."""

import os
from pathlib import Path

import pytest
import torch
from support import loud_adapter, tiny_model

from deltamem_fast import DeltaMemConfig, patch_model, push_to_hub
from deltamem_fast.adapter.card import adapter_card, front_matter, short_names
from deltamem_fast.adapter.files import RELEASED_NAME, SAFETENSORS_NAME, adapter_state_dict, read_weights
from deltamem_fast.adapter.fingerprints import hub_id
from deltamem_fast.config import CONFIG_NAME


class Hub:
    """huggingface_hub's HfApi as far as push_to_hub uses it."""

    def __init__(self, card=False, error=None):
        self.card, self.error, self.calls = card, error, {}

    def __call__(self, **arguments):
        self.calls["HfApi"] = arguments
        return self

    def create_repo(self, repo_id, **arguments):
        if self.error is not None:
            raise self.error
        self.calls["create_repo"] = {"repo_id": repo_id, **arguments}
        return type("Repository", (), {"repo_id": f"someone/{repo_id.rpartition('/')[2]}"})

    def file_exists(self, repo_id, name, **arguments):
        return self.card and (repo_id, name) == ("someone/adapter", "README.md")

    def upload_folder(self, folder_path, **arguments):
        self.calls["upload_folder"] = arguments
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.weights = read_weights(folder_path)
        return type("Commit", (), {"commit_url": "https://hub/someone/adapter/commit/1"})


@pytest.fixture(scope="module")
def model():
    return loud_adapter(patch_model(tiny_model()))


def upload(model, monkeypatch, hub, *arguments, **options):
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    return push_to_hub(model, *arguments, **options)


def test_push_to_hub(model, monkeypatch):
    hub = Hub()
    url = upload(model, monkeypatch, hub, "adapter", private=True, token="secret", commit_message="The first")
    assert url == "https://hub/someone/adapter/commit/1" and hub.calls["HfApi"] == {"token": "secret"}
    assert hub.calls["create_repo"] == {"repo_id": "adapter", "private": True, "exist_ok": True}
    assert hub.calls["upload_folder"]["repo_id"] == "someone/adapter"
    assert hub.calls["upload_folder"]["commit_message"] == "The first"
    assert sorted(hub.files) == ["README.md", SAFETENSORS_NAME, CONFIG_NAME]
    theirs = adapter_state_dict(model)
    assert hub.weights.keys() == theirs.keys() and all(torch.equal(hub.weights[key], theirs[key]) for key in theirs)
    card = hub.files["README.md"].decode()
    assert 'patch_model(model, "someone/adapter")' in card and "| rank | 8 |" in card
    assert "secret" not in card and os.path.expanduser("~") not in card


def test_the_released_format_and_a_card_that_is_there(model, monkeypatch):
    hub = Hub(card=True)
    upload(model, monkeypatch, hub, "someone/adapter", format="released")
    assert sorted(hub.files) == [RELEASED_NAME, CONFIG_NAME] and b"format_version" not in hub.files[CONFIG_NAME]


def test_what_push_to_hub_refuses(model, monkeypatch):
    from huggingface_hub.errors import HFValidationError

    hub = Hub()
    with pytest.raises(ValueError, match="not patched"):
        upload(tiny_model(), monkeypatch, hub, "adapter")
    with pytest.raises(ValueError, match="format: got 'pt', allowed safetensors, released"):
        upload(model, monkeypatch, hub, "adapter", format="pt")
    assert "create_repo" not in hub.calls
    with pytest.raises(TypeError, match="repo_id: got NoneType, allowed a string"):
        push_to_hub(model, None)
    with pytest.raises(ValueError, match="repo_id: got 'a//b', allowed owner/name"):
        upload(model, monkeypatch, Hub(error=HFValidationError("no")), "a//b")
    with pytest.raises(OSError, match="repo_id: adapter: the hub refuses, or cannot be reached: no network"):
        upload(model, monkeypatch, Hub(error=ConnectionError("no network")), "adapter")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("/home/ada/models/Qwen3-4B", None),
        ("~/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/0123", "Qwen/Qwen3-4B"),
        (r"C:\hub\models--Qwen--Qwen3-4B\snapshots\0123", "Qwen/Qwen3-4B"),
        ("./models/small", None),
        ("../Qwen3", None),
        ("models/../x", None),
        ("Qwen3-4B", None),
        ("", None),
        (None, None),
    ],
)
def test_hub_ids(given, expected):
    assert hub_id(given) == expected


def test_a_path_that_looks_like_an_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_id("models/mine") == "models/mine"
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/mine") is None


def test_cards_name_an_id_or_nothing():
    assert "base_model: Qwen/Qwen3-4B" in front_matter("Qwen/Qwen3-4B")
    assert not any("base_model" in line for line in front_matter(None))
    card = adapter_card(DeltaMemConfig(), None, "someone/adapter")
    assert "base_model" not in card and "An online memory, uploaded" in card
    assert "An online memory for Qwen/Qwen3-4B, uploaded" in adapter_card(DeltaMemConfig(), "Qwen/Qwen3-4B", "a/b")


def test_names_of_files_without_their_folders():
    assert short_names(["/home/ada/a.jsonl", "b.jsonl"]) == ["a.jsonl", "b.jsonl"]
    assert short_names(["/home/ada/x/a.jsonl", "/home/ada/y/a.jsonl"]) == ["x/a.jsonl", "y/a.jsonl"]
    assert short_names(["a.jsonl", "a.jsonl"]) == ["a.jsonl", "a.jsonl"] and short_names([]) == []
