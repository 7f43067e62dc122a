"""Sessions for the tests: on the backbone of the recall proof, and on tiny models that say what they are told to."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

from support import Says, loud_adapter, tiny_model
from transformers import LogitsProcessorList

from deltamem_fast import DeltaMemConfig, MemorySession, patch_model
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.recall.weights import find_weights, load_backbone
from deltamem_fast.storage import snapshots

WRITTEN_BEFORE = Path(__file__).parent / "written_before"

CONFIGS = {
    "tsw": DeltaMemConfig.tsw(),
    "ssw": DeltaMemConfig.ssw("sentence_mean"),
    "ssw-message": DeltaMemConfig.ssw("message_mean"),
    "msw": DeltaMemConfig.msw(2),
}


@functools.cache
def recall_model(strategy: str):
    """The shipped backbone with its adapter, and its tokenizer; shared by the tests of a process."""
    weights = find_weights()
    model, tokenizer = load_backbone(weights.backbone)
    return patch_model(model, weights.adapters[strategy]), tokenizer


def tiny_session(tokenizer, strategy: str = "tsw", family: str = "qwen3", **settings) -> MemorySession:
    """A session on a random model with a loud adapter."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(family, vocab_size=len(tokenizer), num_hidden_layers=2, **special)
    patch_model(model, CONFIGS[strategy], backend="reference")
    return MemorySession(loud_adapter(model), tokenizer, **settings)


def old_session(tokenizer, directory: Path, name: str = "session_v1") -> MemorySession:
    """A new session as the one of tests/written_before was, and in ``directory`` a copy of that.

    Another version of transformers gives the backbone another fingerprint, so that the copy gets today's.
    """
    session = tiny_session(tokenizer, context_turns=1)
    shutil.copytree(WRITTEN_BEFORE / name, directory, dirs_exist_ok=True)
    manifest = json.loads((directory / "session.json").read_text())
    manifest["identity"] = identity_of(session.model).fingerprints()
    (directory / "session.json").write_text(json.dumps(manifest))
    return session


def change_manifest(directory: Path, change) -> None:
    """Have ``change`` alter a saved session's manifest, and give it the checksum of what it then is."""
    path = directory / "session.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)
    change(manifest)
    write_manifest(path, manifest)


def write_manifest(path: Path, manifest: dict) -> None:
    """Write a manifest, with the checksum that it has from format version 2 on."""
    sealed = manifest.get("format_version") != 1
    path.write_bytes(snapshots._sealed(manifest)[0] if sealed else json.dumps(manifest).encode())


def says(tokenizer, text: str) -> dict:
    """Options of ``send`` that make the answer ``text``."""
    return {"logits_processor": LogitsProcessorList([Says(tokenizer, text)]), "max_new_tokens": 200}


def state_bits(memory) -> dict[int, bytes]:
    """A memory's states, to compare bit for bit."""
    return {layer: state.numpy().tobytes() for layer, state in memory.items()}


def cache_bits(session: MemorySession) -> list[tuple[bytes, bytes]]:
    """The session's keys and values, to compare bit for bit; built first if they are not there."""
    cache = session._now.window()
    assert cache is not None, "the cache is not built"
    return [(layer.keys.numpy().tobytes(), layer.values.numpy().tobytes()) for layer in cache.layers]


def everything(session: MemorySession) -> tuple:
    """Messages, context, memory and cache, to compare bit for bit."""
    cache = None if session._now.cache is None else cache_bits(session)
    counters = [counter.tolist() for counter in session.memory._skipped.values()]
    return session.messages, session.context, session._now.ids, state_bits(session.memory), counters, cache
