"""MemoryBank: the memories of many users or threads by id, in one file, for batches that mix them.

with MemoryBank("users.bank", model) as bank:
    memory = bank.gather(["alice", "bob"])
    model.generate(**inputs, memory=memory)
    bank.commit(["alice", "bob"], memory)
"""

from __future__ import annotations

import builtins  # inside the class, ``list`` is its method
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch

from .errors import (
    ArgumentError,
    ArgumentKeyError,
    ArgumentTypeError,
    FileFormatError,
    FileMissingError,
    PathExistsError,
)
from .files import read_json, write_json
from .record import describe_difference, identity_of
from .state import MemoryState
from .storage.bank_store import BankConflict, BankEntry, BankStore, check_id, check_ids

__all__ = ["BankConflict", "BankEntry", "MemoryBank"]

EXPORT_FORMAT = "deltamem-bank-export"
EXPORT_VERSION = 1
INDEX = "index.json"
_STAGE_BYTES = 2**20  # of rows between the file and the layers' tensors


class MemoryBank:
    """Memories by id in a SQLite file, of one adapter on one backbone.

    Ids are strings of 1 to 512 bytes of UTF-8. Processes and threads share the file (or, across ``os.fork``, the
    object). None of their commits is lost: each names the versions that its memories were gathered at, and is refused
    if one has moved on. A row holds a memory's float32 state and its counts of skipped tokens, 9,360 bytes for
    Qwen3-4B with the released recipe.
    """

    def __init__(self, path: str | os.PathLike, model, *, durable: bool = True):
        """Open the bank at ``path``, or make it; on a disk of this machine, no network share.

        Args:
            model: patched; its adapter and backbone are the bank's from then on.
            durable: True syncs every commit to the disk. False is faster, and a power cut may lose the last commits
                (a killed process loses none).

        Raises:
            ValueError: the model is not patched, the file is no bank, one of a newer format, or one made under
                another adapter or backbone; the message names both. The file is left as it was.
            OSError: the file cannot be opened or made.
        """
        self._model, self._identity = model, identity_of(model)
        self._shapes = {i: spec.shape for i, spec in self._identity.layer_specs().items()}
        # A row, in words of 4 bytes: the layers' float32 states in order, then their int32 counters.
        self._widths = {i: math.prod(shape) for i, shape in self._shapes.items()}
        self._starts = dict(zip(self._widths, itertools.accumulate(self._widths.values(), initial=0)))
        self._state_words = sum(self._widths.values())
        self._words = self._state_words + len(self._widths)
        layout = {
            "layers": json.dumps({str(i): list(shape) for i, shape in self._shapes.items()}),
            "byteorder": sys.byteorder,
            **self._identity.fingerprints(),
        }
        self._store = BankStore(path, layout, 4 * self._words, durable=durable)
        try:
            _check_layout(self._store, layout, 4 * self._words)
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; every later call but this one raises ValueError."""
        self._store.close()

    def __enter__(self) -> MemoryBank:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MemoryBank({str(self._store.path)!r}, {self._identity.adapter_name!r})"

    # --- batches

    def gather(self, ids: Iterable[str], device: torch.device | str | None = None) -> MemoryState:
        """The memories of ``ids`` as the rows of one batch, all of one moment; empty ones for unknown ids.

        Args:
            ids: each once.
            device: of the batch; None is where the model's layers are.

        Returns:
            float32 [len(ids), H, r, r] per layer, with storage of its own. Knows the versions that it was gathered
            at, and so do its copies (``clone``, ``to``, ``select``, ``cat``, …).

        Raises:
            TypeError, ValueError: an id is not allowed or comes twice.
        """
        ids = check_ids(ids)
        versions, states, counters = self._read(ids)
        layers, skipped = {}, {}
        for i, spec in self._identity.layer_specs().items():
            place = spec.device if device is None else torch.device(device)
            layers[i], skipped[i] = states[i].to(place), counters[i].to(place)
        memory = MemoryState(layers, identity=self._identity, skipped=skipped)
        memory._versions = dict(zip(ids, versions))
        return memory

    def commit(self, ids: Iterable[str], state: MemoryState, *, overwrite: bool = False) -> None:
        """Store row n of ``state`` under the n-th id, all or none.

        An id must be at the version that ``state`` was gathered at; one that it was not gathered with must not be
        there yet. Afterwards ``state`` counts as gathered at the new version, and can be committed again.

        Args:
            ids: each once, as many as ``state`` has rows, in its order.
            overwrite: True stores whatever the versions are.

        Raises:
            BankConflict: ids have moved on (another commit, or a delete): gather again. Nothing is written.
            TypeError, ValueError: an id is not allowed or comes twice, the state does not fit the ids or the bank, or
                it holds NaN or Inf. Nothing is written.
            TimeoutError: others were writing for a minute. Nothing is written.
        """
        ids = check_ids(ids)
        self._check_state(ids, state)
        if not ids:
            return
        words = self._words_of(state).numpy()
        finite = numpy.isfinite(words[:, : self._state_words].view(numpy.float32)).all(1)
        if not finite.all():
            broken = [id for id, good in zip(ids, finite.tolist()) if not good]
            raise ArgumentError(f"state: the memories of {_some(broken)} hold NaN or Inf")
        data, size = memoryview(words.reshape(-1)).cast("B"), 4 * self._words
        rows = [data[start : start + size] for start in range(0, len(data), size)]
        expected = None if overwrite else [state._versions.get(id, 0) for id in ids]
        version = self._store.write(ids, expected, rows)
        state._versions.update(dict.fromkeys(ids, version))

    def delete(self, ids: Iterable[str]) -> int:
        """Delete memories, all or none; returns how many there were.

        A later commit of one that was gathered before is refused, also if the id has been made again meanwhile.

        Raises:
            TypeError, ValueError: an id is not allowed or comes twice.
            TimeoutError: others were writing for a minute.
        """
        return self._store.delete(check_ids(ids))

    # --- what is there

    def __len__(self) -> int:
        return self._store.count()

    def __contains__(self, id: object) -> bool:
        try:
            check_id(id)
        except (TypeError, ValueError):
            return False
        return self._store.versions([id]) != [0]

    def list(
        self,
        *,
        prefix: str = "",
        order_by: str = "id",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> builtins.list[BankEntry]:
        """Ids, versions, sizes and times of the memories whose id begins with ``prefix``; reads no memory.

        Args:
            order_by: "id", "updated", "created" or "bytes"; equals come by id.
            limit: at most so many, after leaving out the first ``offset``; None is all.

        Raises:
            TypeError, ValueError: an argument is not allowed.
        """
        return self._store.entries(
            prefix=prefix, order_by=order_by, descending=descending, limit=limit, offset=offset
        )  # fmt: skip

    # --- files

    def export(self, id: str, path: str | os.PathLike) -> Path:
        """Write one memory to a file as ``MemoryState.save`` does; returns its path.

        Raises:
            KeyError: no such id.
        """
        memory = self.gather([check_id(id)], "cpu")
        if memory._versions[id] == 0:
            raise ArgumentKeyError(f"id: {id!r}: not in the bank")
        return memory.save(path)

    def import_(self, id: str, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Store under ``id`` the one memory of a file that ``export`` or ``MemoryState.save`` wrote.

        Raises:
            BankConflict: the id is there already, and ``overwrite`` is False.
            FileNotFoundError: no such file.
            ValueError: not such a file, of another adapter or backbone, or not of one memory.
        """
        check_id(id)
        memory = MemoryState.load(path, self._model)
        if memory.batch_size != 1:
            raise FileFormatError(f"path: {path}: holds {memory.batch_size} memories, allowed 1")
        self.commit([id], memory, overwrite=overwrite)

    def export_all(self, directory: str | os.PathLike, *, batch_size: int = 512) -> int:
        """Write every memory to ``directory``; returns how many.

        Files as of ``MemoryState.save``, of ``batch_size`` rows each, and last ``index.json``, which names the rows'
        ids. Each file is of one moment; what is committed meanwhile is in it or not.

        Raises:
            FileExistsError: the directory is not empty.
            ValueError: batch_size < 1.
        """
        directory = Path(directory)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(f"batch_size: got {batch_size!r}, allowed an integer, 1 or more")
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise PathExistsError(f"directory: {directory}: not empty")
        ids = [entry.id for entry in self.list()]
        files = []
        for start in range(0, len(ids), batch_size):
            memory = self.gather(ids[start : start + batch_size], "cpu")
            there = [n for n, version in enumerate(memory._versions.values()) if version]  # not deleted meanwhile
            name = f"memories-{len(files):06}.safetensors"
            memory.select(there).save(directory / name)
            files.append({"file": name, "ids": [ids[start + n] for n in there]})
        write_json(directory / INDEX, {"format": EXPORT_FORMAT, "format_version": EXPORT_VERSION, "files": files})
        return sum(len(file["ids"]) for file in files)

    def import_all(self, directory: str | os.PathLike, *, overwrite: bool = False) -> int:
        """Store every memory that ``export_all`` wrote to ``directory``; returns how many.

        File by file, each all or none: after an error the files before it are stored.

        Raises:
            BankConflict: ids are there already, and ``overwrite`` is False; found before anything is stored.
            FileNotFoundError: no index, or a file that it names is not there.
            ValueError: the index or a file is not as ``export_all`` wrote it, or of another adapter or backbone.
        """
        directory = Path(directory)
        files = _read_index(directory / INDEX)
        ids = check_ids([id for _, names in files for id in names], "directory: ids of the index")
        if not overwrite:
            there = {id: (0, version) for id, version in zip(ids, self._store.versions(ids)) if version}
            if there:
                raise BankConflict(there)
        for name, names in files:
            memory = MemoryState.load(directory / name, self._model)
            if memory.batch_size != len(names):
                raise FileFormatError(
                    f"directory: {name} holds {memory.batch_size} memories, the index says {len(names)}"
                )
            self.commit(names, memory, overwrite=overwrite)
        return len(ids)

    # --- inside

    def _check_state(self, ids: builtins.list[str], state: MemoryState) -> None:
        if not isinstance(state, MemoryState):
            raise ArgumentTypeError(f"state: got a {type(state).__name__}, allowed a MemoryState")
        if state.batch_size != len(ids):
            raise ArgumentError(f"state: got {state.batch_size} memories for {len(ids)} ids, allowed one for each")
        shapes = {i: tuple(layer.shape[1:]) for i, layer in state.items()}
        if shapes != self._shapes:
            raise ArgumentError(f"state: got layers {shapes}, allowed {self._shapes}")
        dtypes = {layer.dtype for _, layer in state.items()}
        if dtypes - {torch.float32}:
            raise ArgumentError(f"state: got {', '.join(sorted(map(str, dtypes)))}, allowed torch.float32")
        state.check_whole()
        self._identity.check(state._identity)

    def _read(self, ids: builtins.list[str]) -> tuple:
        """Versions, and each layer's state (float32 [B, H, r, r]) and counter (int32 [B]); 0 for unknown ids.

        Rows are taken apart some at a time, while the processor's cache holds them; by numpy, in this thread: for so
        little PyTorch would wait for its pool, 10 ms and more where cores are busy.
        """
        versions = [0] * len(ids)
        layers = {
            i: torch.empty(len(ids), *shape, dtype=torch.float32, device="cpu") for i, shape in self._shapes.items()
        }
        states = {i: layer.view(len(ids), self._widths[i]).numpy() for i, layer in layers.items()}
        counters = numpy.empty((len(self._widths), len(ids)), numpy.int32)
        size, places = 4 * self._words, []
        staged = numpy.empty((max(1, min(len(ids), _STAGE_BYTES // size)), self._words), numpy.int32)
        floats, data = staged.view(numpy.float32), memoryview(staged.reshape(-1)).cast("B")

        def take() -> None:
            rows, first = len(places), places[0] if places else 0
            # A slice is much the quicker: all but rows beside unknown ones.
            at = slice(first, first + rows) if places == list(range(first, first + rows)) else numpy.array(places)
            for i, state in states.items():
                state[at] = floats[:rows, self._starts[i] : self._starts[i] + self._widths[i]]
            counters[:, at] = staged[:rows, self._state_words :].T

        for place, version, row in self._store.each(ids):
            versions[place] = version
            data[len(places) * size : (len(places) + 1) * size] = row
            places.append(place)
            if len(places) == len(staged):
                take()
                places.clear()
        take()
        unknown = [n for n, version in enumerate(versions) if version == 0]
        if unknown:
            for state in states.values():
                state[unknown] = 0
            counters[:, unknown] = 0
        # Each layer's are updated in place, so that none may share storage with another's.
        return versions, layers, {i: torch.from_numpy(counter.copy()) for i, counter in zip(layers, counters)}

    def _words_of(self, state: MemoryState) -> torch.Tensor:
        """int32 [B, words], the rows of a state, on the CPU."""
        rows = state.batch_size
        states = [state[i].detach().reshape(rows, -1).contiguous().view(torch.int32) for i in self._shapes]
        counters = [state._skipped[i].detach().reshape(rows, 1) for i in self._shapes]
        parts = states + counters
        if len({part.device for part in parts}) > 1:
            parts = [part.cpu() for part in parts]
        return torch.cat(parts, 1).cpu()  # one copy where all layers share a device


def _check_layout(store: BankStore, ours: dict[str, str], row_bytes: int) -> None:
    difference = describe_difference(store.layout, ours)
    if difference:
        raise FileFormatError(f"path: {store.path}: a bank of memories made under {difference}")
    for name in ("byteorder", "layers"):
        if store.layout.get(name) != ours[name]:
            raise FileFormatError(
                f"path: {store.path}: a bank of {name} {store.layout.get(name)}, but here it is {ours[name]}"
            )
    if store.row_bytes != row_bytes:
        raise FileFormatError(
            f"path: {store.path}: a bank of {store.row_bytes} bytes a memory, but here it is {row_bytes}"
        )


def _read_index(path: Path) -> list[tuple[str, list[str]]]:
    """(file name, ids) of each file of an export."""
    if not path.is_file():
        raise FileMissingError(f"directory: {path}: no such file")
    index = read_json(path)
    if index.get("format") != EXPORT_FORMAT:
        raise FileFormatError(
            f"directory: {path}: no export of a bank (format {index.get('format')!r}, allowed {EXPORT_FORMAT!r})"
        )
    if index.get("format_version") != EXPORT_VERSION:
        raise FileFormatError(
            f"directory: {path}: format version {index.get('format_version')!r}, this version reads {EXPORT_VERSION}"
        )
    files = index.get("files")
    for file in files if isinstance(files, list) else [None]:
        # The index may come from elsewhere: only files beside it are read.
        if not isinstance(file, dict) or Path(str(file.get("file"))).name != file.get("file"):
            raise FileFormatError(f"directory: {path}: got {file!r}, allowed the name of a file beside it and its ids")
    return [(file["file"], check_ids(file.get("ids"), f"directory: {path}: ids")) for file in files]


def _some(ids: list[str]) -> str:
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(map(repr, ids[:5])) + more
