"""Targets that read the files of memories, adapters, sessions, banks and training."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import shutil
import sqlite3
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from places import BEFORE, Target, adapter_bits, folder, model, tokenizer, untouched, written

from deltamem_fast import DeltaMemConfig, MemoryBank, MemorySession, MemoryState, load_adapter, save_adapter
from deltamem_fast.adapter.files import write_adapter
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.config import CONFIG_NAME
from deltamem_fast.errors import DeltaMemError
from deltamem_fast.memory import bank_index
from deltamem_fast.memory.file import read_memory
from deltamem_fast.storage import snapshots
from deltamem_fast.storage.bank_store import BankStore
from deltamem_fast.storage.files import parse_json, read_json
from deltamem_fast.storage.tensors import parse_tensors, seal
from deltamem_fast.training.checkpoints import Run, checkpoint_to_resume, newest_checkpoint, step_of
from deltamem_fast.training.data import ExampleFiles
from deltamem_fast.training.episode import build_episode
from deltamem_fast.training.log import read_log
from deltamem_fast.training.options import TrainingOptions

# --- safetensors: a file is its header's length, its header, and what that describes


def head_and_rest(data: bytes) -> bytes:
    """A safetensors file in the form ``head``: its header in a line, without the checksum, then the rest."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.get("__metadata__", {}).pop("sha256", None)
    return json.dumps(header).encode() + b"\n" + data[8 + length :]


def composed(data: bytes) -> bytes:
    """A safetensors file of such a form: the length fits, and so does the checksum, if there can be one."""
    head, _, rest = data.partition(b"\n")
    plain = struct.pack("<Q", len(head)) + head + rest
    with contextlib.suppress(Exception):
        header = json.loads(head)
        metadata = header["__metadata__"]
        metadata["sha256"] = seal(metadata, safetensors.torch.load(plain))
        head = json.dumps(header).encode()
        return struct.pack("<Q", len(head)) + head + rest
    return plain


@functools.cache
def memory_file(rows: int = 2) -> bytes:
    """A memory of ``model`` that something was written to."""
    memory = MemoryState.zeros(model(), batch_size=rows)
    with torch.no_grad():
        model()(torch.randint(3, 90, (rows, 6), generator=torch.Generator().manual_seed(3)), memory=memory)
    return memory.save(folder() / "seed.safetensors").read_bytes()


def _load_memory(data: bytes) -> None:
    path = written(data, "memory.safetensors")
    errors = []
    with untouched(path):
        for call in (
            lambda: read_memory(path).made_with,
            lambda: MemoryState.load(path, model()),
            lambda: MemoryState.load(path, model(), adopt=True),
        ):
            try:
                found = call()
            except DeltaMemError as error:
                errors.append(error)
                continue
            if isinstance(found, MemoryState):
                specs = identity_of(model()).layer_specs()
                assert list(found) == list(specs)
                for i, state in found.items():
                    assert state.dtype == torch.float32 and tuple(state.shape[1:]) == specs[i].shape
                    assert bool(state.isfinite().all()) and found.counter(i).shape == state.shape[:1]
    if errors:
        raise errors[-1]


def _safetensors() -> list[bytes]:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 4, dtype=torch.int32)}
    tensors["c"] = torch.ones(3, dtype=torch.bfloat16)
    return [safetensors.torch.save(tensors, {"format": "x"}), safetensors.torch.save({}), memory_file()]


# --- adapters


@functools.cache
def _adapter() -> Path:
    return save_adapter(model(), folder() / "adapter-seed")


def _adapter_directory(name: str, data: bytes) -> Path:
    directory = folder() / "adapter"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(_adapter(), directory)
    if name.endswith(".pt"):
        (directory / "delta_mem_adapter.safetensors").unlink()
    (directory / name).write_bytes(data)
    return directory


def _load_adapter(name: str, data: bytes) -> None:
    """Into a model that keeps its weights, whatever was wrong."""
    directory, before = _adapter_directory(name, data), adapter_bits()
    path = directory / name
    try:
        with untouched(path):
            load_adapter(model(), directory)
    except DeltaMemError:
        assert adapter_bits() == before, "a part of an adapter was loaded"
        raise
    assert all(bool(p.isfinite().all()) for n, p in model().named_parameters() if ".delta_memory." in n)
    load_adapter(model(), _adapter())
    assert adapter_bits() == before


def _read_config(data: bytes) -> None:
    directory = written(data, f"config/{CONFIG_NAME}").parent
    config = DeltaMemConfig.load(directory)
    assert DeltaMemConfig.from_dict({"format_version": 1} | config.to_dict()) == config


def _configs() -> list[bytes]:
    ours = DeltaMemConfig.msw(2, trainable_delta_scale=True, target_layers=(0, 1))
    return [(_adapter() / CONFIG_NAME).read_bytes(), json.dumps({"format_version": 1} | ours.to_dict()).encode()]


@functools.cache
def _released() -> bytes:
    weights = safetensors.torch.load_file(_adapter() / "delta_mem_adapter.safetensors")
    directory = folder() / "released-seed"
    write_adapter(directory, identity_of(model()).config, weights, "released")
    return (directory / "delta_mem_adapter.pt").read_bytes()


def _pickled(data: bytes) -> bytes:
    """The released file with another ``data.pkl``."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_released())) as archive, zipfile.ZipFile(made, "w") as changed:
        for entry in archive.infolist():
            whole = archive.read(entry)
            changed.writestr(entry.filename, data if entry.filename.endswith("/data.pkl") else whole)
    return made.getvalue()


def _pickles() -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(_released())) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]


# --- sessions


@functools.cache
def _session() -> Path:
    session = MemorySession(model(), tokenizer(), context_turns=2, system="Be brief.")
    for text in ("My dog is called Rex.", "Where did Ada go?"):
        session.answer(text, max_new_tokens=3)
    return session.save(folder() / "session-seed")


def _session_content() -> dict:
    manifest = json.loads((_session() / snapshots.MANIFEST).read_text())
    return {name: manifest[name] for name in manifest if name not in ("sha256", "files")}


def _state_path() -> Path:
    return next(_session().glob("*.safetensors"))


def _load_session(manifest: bytes, state: bytes) -> None:
    directory = folder() / "session"
    directory.mkdir(exist_ok=True)
    paths = [directory / snapshots.MANIFEST, directory / _state_path().name]
    for path, data in zip(paths, (manifest, state)):
        path.write_bytes(data)
    with untouched(*paths):
        session = MemorySession.load(directory, model(), tokenizer())
    assert len(session.messages) >= 2 * len(session._now.turns)
    assert all(bool(state.isfinite().all()) for _, state in session.memory.items())


def _sealed(content: dict, state: bytes) -> bytes:
    entry = {"name": _state_path().name, "bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    return snapshots._sealed({**content, "files": {"state": entry}})[0]


def _load_content(data: bytes) -> None:
    """A manifest's content, under a checksum that fits."""
    state = _state_path().read_bytes()
    head = {"name": _state_path().name, "bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    text = data.strip()
    if text.startswith(b"{"):
        whole = (
            b'{\n  "sha256": "'
            + b"0" * 64
            + b'",\n  "files": '
            + json.dumps({"state": head}).encode()
            + b", "
            + text[1:]
        )
        data = whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1)
    _load_session(data, state)


def _load_state(data: bytes) -> None:
    """A session's tensors, under checksums that fit."""
    state = composed(data)
    _load_session(_sealed(_session_content(), state), state)


# --- banks

ROW, LAYOUT = 40, {"kind": "fuzz"}
IDS = ["ada", "bob", "çelik", "d" * 300]


@functools.cache
def _bank() -> bytes:
    path = folder() / "seed.bank"
    with contextlib.closing(BankStore(path, LAYOUT, ROW, durable=False)) as store:
        store.write(IDS, [0] * len(IDS), [bytes([n]) * ROW for n in range(len(IDS))])
        store.delete(IDS[1:2])
    return path.read_bytes()


def _use_bank(path: Path) -> None:
    """Open, list, read, write, delete: each as it should be, or an error of ours; refused, the file is as it was."""
    data = path.read_bytes()
    try:
        store = BankStore(path, LAYOUT, ROW, durable=False, timeout=1.0)
    except DeltaMemError:
        assert path.read_bytes() == data, "a bank that was refused was written to"
        raise
    row = bytes(min(store.row_bytes, 10_000) if store.row_bytes > 0 else 0)
    with contextlib.closing(store):
        _call_all(
            store.count, store.entries, lambda: store.entries("a", "updated", True, 2),
            lambda: store.read([*IDS, "new"]), lambda: store.versions(IDS),
            lambda: store.write(["ada", "new", "newer"], None, [row] * 3), lambda: store.delete(["ada", "bob"]),
        )  # fmt: skip


def _call_all(*calls: Callable[[], object]) -> None:
    """Each of them, whatever the others do; then the first error of ours, if there was one."""
    errors = []
    for call in calls:
        try:
            call()
        except DeltaMemError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _banks() -> list[bytes]:
    """One of this version, and those that are upgraded when they are opened."""
    return [_bank(), *(gzip.decompress((BEFORE / f"{name}.bank.gz").read_bytes()) for name in ("users", "users-3"))]


def _open_bank(data: bytes) -> None:
    for path in folder().glob("users.bank*"):
        path.unlink()
    _use_bank(written(data, "users.bank"))


def _change_cells(data: bytes) -> None:
    """[table, column, row, value], …: cells of a bank that is sound as a file of SQLite's."""
    cells = parse_json(b'{"cells": ' + data + b"}", "cells")["cells"]
    for path in folder().glob("users.bank*"):
        path.unlink()
    path = written(_bank(), "users.bank")
    with (
        contextlib.closing(sqlite3.connect(path)) as connection,
        contextlib.suppress(sqlite3.Error, ValueError, OverflowError),
    ):
        connection.execute("PRAGMA journal_mode = DELETE")
        for cell in cells if isinstance(cells, list) else ():
            table, column, row, value = (
                cell if isinstance(cell, list) and len(cell) == 4 else ("meta", "value", 0, None)
            )
            columns = _COLUMNS.get(table if isinstance(table, str) else "", ())
            value = json.dumps(value) if isinstance(value, list | dict) else value
            value = value.encode() if isinstance(value, str) and value.startswith("blob") else value
            if column in columns and type(row) is int:
                rows = connection.execute(f"SELECT {columns[0]} FROM {table}").fetchall()
                which = rows[row % len(rows)][0]
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE {columns[0]} = ?", (value, which))
        connection.commit()
    _use_bank(path)


_COLUMNS = {
    "meta": ("name", "value"),
    "memories": ("id", "key", "version", "bytes", "created", "updated", "row_sum", "entry_sum"),
    "states": ("key", "state"),
}


def _cells() -> list[bytes]:
    return [
        json.dumps([["meta", "value", 0, 3], ["memories", "version", 1, 2**40]]).encode(),
        json.dumps([["states", "state", 1, "blob"], ["memories", "id", 2, "x"]]).encode(),
        json.dumps([["memories", "key", 0, -1], ["states", "key", 0, 2**62]]).encode(),
        *(json.dumps([["states", "key", 0, 2**63 - n]]).encode() for n in (1, 2, 3)),
        *(json.dumps([["meta", "value", n, 2**63 - 1]]).encode() for n in range(5)),
        *(json.dumps([["meta", "value", n, -5]]).encode() for n in range(5)),
        *(json.dumps([["meta", "value", n, 1.5]]).encode() for n in range(5)),
    ]


@functools.cache
def _export() -> Path:
    directory = folder() / "export-seed"
    with MemoryBank(folder() / "export.bank", model(), durable=False) as bank:
        for n, id in enumerate(("ada", "bob")):
            bank.commit([id], MemoryState.load(written(memory_file(), "m.safetensors"), model()).select([n]))
        bank.export_all(directory, batch_size=1)
    return directory


def _import_all(data: bytes) -> None:
    """An index, under a checksum that fits: a bank has all of its memories afterwards, or none."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
        index = json.loads(data)
        index["sha256"] = bank_index._digest_of(index["files"])
        if json.dumps(index) == json.dumps(json.loads(data, object_pairs_hook=_once)):
            data = json.dumps(index).encode()
    directory = folder() / "export"
    if not directory.exists():
        shutil.copytree(_export(), directory)
    (directory / bank_index.INDEX).write_bytes(data)
    bank = _receiving()
    try:
        imported = bank.import_all(directory)
    except DeltaMemError:
        # Files before a bad one are stored: as many ids as are there were told.
        bank.delete(["ada", "bob"])
        assert len(bank) == 0
        raise
    assert len(bank) == imported
    bank.delete([entry.id for entry in bank.list()])


def _once(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("twice")
    return dict(pairs)


@functools.cache
def _receiving() -> MemoryBank:
    return MemoryBank(folder() / "receiving.bank", model(), durable=False)


# --- training


def _read_examples(data: bytes) -> None:
    path = written(data, "train.jsonl")
    with untouched(path):
        files = ExampleFiles([path])
        for example in files:
            for kind in ("both", "state_only"):
                with contextlib.suppress(DeltaMemError):
                    episode = build_episode(tokenizer(), identity_of(model("ssw")).config, example, kind)
                    assert len(episode.labels) == len(episode.read_ids)
                    assert len(episode.segment_ids) == len(episode.write_ids)


def _examples() -> list[bytes]:
    user, said = {"role": "user", "content": "Where is Rex?"}, {"role": "assistant", "content": "At home. So."}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    lines = [
        {"messages": [{"role": "system", "content": "s"}, user, said, parts, said], "targets": [2, 4], "id": 1},
        {"write": [user, said], "read": [parts], "answer": "Yes."},
        {"messages": [user, {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {}}}]}]},
    ]  # fmt: skip
    return ["\n".join(json.dumps(line) for line in lines).encode(), b"\xef\xbb\xbf" + json.dumps(lines[1]).encode()]


def _read_log(data: bytes) -> None:
    path = written(data, "log.jsonl")
    with untouched(path):
        assert all(type(entry["step"]) is int for entry in read_log(path))


_RUN = Run("tiny", "float32", {"rank": 8}, "0" * 64, 4, {"steps": 10, "seed": 0})


def _check_run(data: bytes) -> None:
    """What lies in a run's directory: of the run, and of a checkpoint."""
    directory = written(data, "run/training.json").parent
    checkpoint = written(data, "run/checkpoint-5/checkpoint.json").parent
    for name in (CONFIG_NAME, "delta_mem_adapter.safetensors"):
        written(b"", f"run/checkpoint-5/{name}")
    found = newest_checkpoint(directory)
    assert found is None or type(step_of(found)) is int
    checkpoint_to_resume(TrainingOptions(output=str(directory), resume="auto"))
    _call_all(
        lambda: step_of(checkpoint),
        lambda: _RUN.check(directory),
        lambda: read_json(directory / "training.json"),
    )


def _runs() -> list[bytes]:
    return [json.dumps(vars(_RUN) | {"step": 5}).encode(), json.dumps({"step": 2**31 - 1}).encode()]


def _parse_json(data: bytes) -> None:
    value = parse_json(data, "x.json", "value")
    try:
        json.dumps(value, allow_nan=False)
        repr(value)
    except RecursionError as error:
        raise AssertionError("nested more deeply than others can read") from error


TARGETS = [
    Target("json", "deltamem_fast.storage.files:parse_json", _parse_json, lambda: [*_configs(), *_runs()], "json", 400),
    Target("tensors", "deltamem_fast.storage.tensors:parse_tensors", lambda data: parse_tensors(data, "x", "value"),
           _safetensors, "bytes", 400),
    Target("memory-file", "deltamem_fast.memory.state:load_memory", _load_memory,
           lambda: [memory_file(), (BEFORE / "memory.safetensors").read_bytes()], "bytes"),
    Target("memory-head", "deltamem_fast.memory.file:read_memory", lambda data: _load_memory(composed(data)),
           lambda: [head_and_rest(memory_file())], "head", 500),
    Target("adapter-config", "deltamem_fast.config:DeltaMemConfig.load", _read_config, _configs, "json", 500),
    Target("adapter-file", "deltamem_fast.adapter.files:read_weights",
           lambda data: _load_adapter("delta_mem_adapter.safetensors", data),
           lambda: [(_adapter() / "delta_mem_adapter.safetensors").read_bytes()], "bytes", 120),
    Target("adapter-head", "deltamem_fast.adapter.files:load_adapter",
           lambda data: _load_adapter("delta_mem_adapter.safetensors", composed(data)),
           lambda: [head_and_rest((_adapter() / "delta_mem_adapter.safetensors").read_bytes())], "head"),
    Target("released-file", "deltamem_fast.adapter.released_file:read_released",
           lambda data: _load_adapter("delta_mem_adapter.pt", data), lambda: [_released()], "bytes"),
    Target("released-pickle", "deltamem_fast.adapter.released_file:read_released",
           lambda data: _load_adapter("delta_mem_adapter.pt", _pickled(data)), _pickles, "bytes", 400),
    Target("session-manifest", "deltamem_fast.storage.snapshots:read",
           lambda data: _load_session(data, _state_path().read_bytes()),
           lambda: [(_session() / snapshots.MANIFEST).read_bytes()], "json", 150),
    Target("session-content", "deltamem_fast.session.schema:check_content", _load_content,
           lambda: [json.dumps(_session_content()).encode()], "json", 600),
    Target("session-state", "deltamem_fast.session.saving:load", _load_state,
           lambda: [head_and_rest(_state_path().read_bytes())], "head"),
    Target("bank-file", "deltamem_fast.storage.bank_store:BankStore", _open_bank, _banks, "bytes", 200),
    Target("bank-cells", "deltamem_fast.storage.bank_store:BankStore", _change_cells, _cells, "json", 200),
    Target("bank-index", "deltamem_fast.memory.bank_index:read_index", _import_all,
           lambda: [(_export() / bank_index.INDEX).read_bytes()], "json"),
    Target("training-data", "deltamem_fast.training.data:ExampleFiles", _read_examples, _examples, "lines", 500),
    Target("training-log", "deltamem_fast.training.log:read_log", _read_log,
           lambda: [b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": "nan"}\n{"st'], "lines"),
    Target("training-run", "deltamem_fast.training.checkpoints:Run.check", _check_run, _runs, "json"),
]  # fmt: skip
