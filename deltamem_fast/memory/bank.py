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
from typing import NoReturn

import numpy
import torch

from ..adapter.record import identity_of
from ..arguments import MOST, MOST_64, check_integer
from ..errors import ArgumentError, ArgumentKeyError, ArgumentTypeError, FileFormatError, PathExistsError
from ..storage.bank_entries import BankEntry
from ..storage.bank_ids import BankConflict, check_id, check_ids, first_of
from ..storage.bank_store import BankStore
from ..storage.files import as_path, make_directory, naming_files
from ..storage.tensors import read_metadata
from .bank_index import ExportedFile, read_index, write_index
from .file import check_made_under
from .state import MemoryState, load_memory, place_of

__all__ = ["BankConflict", "BankEntry", "MemoryBank"]

_STAGE_BYTES = 2**20  # of rows between the file and the layers' tensors


class MemoryBank:
    """Memories by id in a SQLite file, of one adapter on one backbone.

    Ids are strings of 1 to 512 bytes of UTF-8. Processes and threads share the file (or, across ``os.fork``, the
    object). None of their commits is lost: each names the versions that its memories were gathered at, and is refused
    if one has moved on. A row holds a memory's float32 state and its counts of skipped tokens, 9,360 bytes for
    Qwen3-4B with the released recipe.
    """

    def __init__(self, path: str | os.PathLike, model, *, durable: bool = True, adopt: bool = False):
        """Open the bank at ``path``, or make it; on a disk of this machine, no network share.

        A new file is its user's alone (0600). A bank of the version before is upgraded in place, in one transaction;
        processes of that version which have it open then fail at their next call.

        Args:
            model: patched; its adapter and backbone are the bank's from then on.
            durable: True syncs every commit to the disk. False is faster, and a power cut may lose the last commits
                (a killed process loses none).
            adopt: True takes a bank of another adapter or backbone too, if its rows fit, and makes it the model's from
                then on: for one that you know to be the model's, such as an old bank whose fingerprint no longer
                matches. What a memory means, only its own adapter knows.

        Raises:
            ValueError: the model is not patched, the file is no bank, damaged, of a newer format, or made under
                another adapter or backbone; the message names both. The file is left as it was.
            OSError: the file cannot be opened or made, or has several names (hard links): SQLite's log lies beside one.
                Later calls raise it where the file was moved, removed or replaced meanwhile.
        """
        self._model, self._identity = model, identity_of(model)
        self._shapes = {i: spec.shape for i, spec in self._identity.layer_specs().items()}
        # A row, in words of 4 bytes: the layers' float32 states in order, then their int32 counters.
        self._widths = {i: math.prod(shape) for i, shape in self._shapes.items()}
        self._groups = [(width, len(list(layers))) for width, layers in itertools.groupby(self._widths.values())]
        self._state_words = sum(self._widths.values())
        self._words = self._state_words + len(self._widths)
        layout = {
            "layers": json.dumps({str(i): list(shape) for i, shape in self._shapes.items()}),
            "byteorder": sys.byteorder,
            **self._identity.fingerprints(),
        }

        row_bytes, whose = 4 * self._words, f"path: {path}: a bank of"

        def check(found: dict[str, str], size: int) -> bool:
            """Raise unless rows of the file fit; whether the layout is to be the model's from now on."""
            difference = check_made_under(found, layout, adopt, f"{whose} memories made under", "its rows fit")
            for name in ("byteorder", "layers"):
                if found.get(name) != layout[name]:
                    raise FileFormatError(f"{whose} {name} {found.get(name)}, but here it is {layout[name]}")
            if size != row_bytes:
                raise FileFormatError(f"{whose} {size} bytes a memory, but here it is {row_bytes}")
            return bool(difference) or "backbone_fields" not in found  # as of the version before

        self._store = BankStore(path, layout, row_bytes, durable=durable, check=check)

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
            float32 [len(ids), H, r, r] per layer, with storage of its own. Every row knows its id and the version
            that it was gathered at, and takes them along (``clone``, ``to``, ``select``, ``cat``, …).

        Raises:
            TypeError, ValueError: an id is not allowed or comes twice; there is no such device; a row is damaged.
        """
        ids = check_ids(ids)
        given = None if device is None else place_of(device)
        versions, states, counters = self._read(ids)
        layers, skipped = {}, {}
        for i, spec in self._identity.layer_specs().items():
            place = spec.device if given is None else given
            layers[i], skipped[i] = states[i].to(place), counters[i].to(place)
        memory = MemoryState(layers, identity=self._identity, skipped=skipped)
        memory.name_rows(zip(ids, versions, itertools.repeat(self._store.name)))
        return memory

    def commit(self, ids: Iterable[str], state: MemoryState, *, overwrite: bool = False) -> None:
        """Store row n of ``state`` under the n-th id, all or none.

        A row that was gathered goes back under its own id alone, which must be at the version that it was gathered at.
        A row from elsewhere needs an id that is not there yet. Afterwards the rows of ``state`` count as gathered at
        the new version, and can be committed again. Whether ``state`` is frozen is not stored.

        Args:
            ids: each once, as many as ``state`` has rows, in its order.
            overwrite: True stores whatever the versions are; not under another's id either, nor in another bank. To
                give somebody's memory to another id or bank on purpose, commit ``state.unnamed()``.

        Raises:
            BankConflict: ids have moved on (another commit, or a delete): gather again. Nothing is written.
            TypeError, ValueError: an id is not allowed or comes twice, a row was gathered under another id or from
                another bank, the state does not fit the ids or the bank, or it holds NaN or Inf. Nothing is written.
            TimeoutError: others were writing for a minute. Nothing is written.
        """
        ids = check_ids(ids)
        self._check_state(ids, state)
        if not ids:
            return
        words = self._words_of(state)
        numbers = words[:, : self._state_words].view(numpy.float32)
        if not _all_finite(numbers):
            broken = [id for id, good in zip(ids, numpy.isfinite(numbers).all(1).tolist()) if not good]
            raise ArgumentError(f"state: the memories of {_some(broken)} hold NaN or Inf")
        counters = words[:, self._state_words :]
        counters[counters < 0] = MOST  # gone past the last int32, where it stays
        data, size = memoryview(words.reshape(-1)).cast("B"), 4 * self._words
        rows = [data[start : start + size] for start in range(0, len(data), size)]
        expected = None if overwrite else [0 if row is None else row[1] for row in state.bank_rows]
        version = self._store.write(ids, expected, rows)
        state.name_rows((id, version, self._store.name) for id in ids)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete memories, all or none; returns how many there were.

        Their bytes are gone from the file and its log when this returns (see ``BankStore.delete`` on readers at work).
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
        return self._store.entries(prefix, order_by, descending, limit, offset)

    # --- files

    def export(self, id: str, path: str | os.PathLike) -> Path:
        """Write one memory to a file as ``MemoryState.save`` does; returns its path.

        Raises:
            KeyError: no such id.
        """
        memory = self.gather([check_id(id)], "cpu")
        if not memory.bank_rows[0][1]:
            raise ArgumentKeyError(f"id: {id!r}: not in the bank")
        return memory.save(path)

    def import_(
        self, id: str, path: str | os.PathLike, *, overwrite: bool = False, adopt: bool = False
    ) -> None:  # fmt: skip
        """Store under ``id`` the one memory of a file that ``export`` or ``MemoryState.save`` wrote.

        Args:
            overwrite: True replaces what is there under ``id``.
            adopt: see ``MemoryState.load``.

        Raises:
            BankConflict: the id is there already, and ``overwrite`` is False.
            FileNotFoundError: no such file.
            ValueError: not such a file, of another adapter or backbone, or not of one memory.
        """
        check_id(id)
        memory = MemoryState.load(path, self._model, adopt=adopt)
        if memory.batch_size != 1:
            raise FileFormatError(f"path: {path}: holds {memory.batch_size} memories, allowed 1")
        self.commit([id], memory, overwrite=overwrite)

    def export_all(self, directory: str | os.PathLike, *, batch_size: int = 512) -> int:
        """Write every memory to ``directory`` (made for this user alone if needed); returns how many.

        Files as of ``MemoryState.save``, of ``batch_size`` rows each, and last ``index.json``, which names the rows'
        ids. Each file is of one moment; what is committed meanwhile is in it or not.

        Raises:
            FileExistsError: the directory is not empty.
            OSError: it is a file, or cannot be written.
            ValueError: batch_size < 1.
        """
        directory = as_path(directory, "directory")
        check_integer(batch_size, "batch_size", 1, MOST_64)
        with naming_files("directory", directory):
            make_directory(directory)
            if any(directory.iterdir()):
                raise PathExistsError(f"directory: {directory}: not empty")
        ids = [entry.id for entry in self.list()]
        files = []
        for start in range(0, len(ids), batch_size):
            memory = self.gather(ids[start : start + batch_size], "cpu")
            there = [n for n, (_, version, _) in enumerate(memory.bank_rows) if version]  # not deleted meanwhile
            memory = memory.select(there)
            path = memory.save(directory / f"memories-{len(files):06}.safetensors")
            # The file's own checksum: it names whose rows these are, too.
            files.append(ExportedFile(path.name, memory.ids, read_metadata(path, "directory")["sha256"]))
        write_index(directory, files)
        return sum(len(file.ids) for file in files)

    def import_all(self, directory: str | os.PathLike, *, overwrite: bool = False, adopt: bool = False) -> int:
        """Store every memory that ``export_all`` wrote to ``directory``; returns how many.

        File by file, each all or none: after an error the files before it are stored.

        Args:
            overwrite: True replaces what is there under the same ids.
            adopt: see ``MemoryState.load``.

        Raises:
            BankConflict: ids are there already, and ``overwrite`` is False; found before anything is stored.
            FileNotFoundError: no index, or a file that it names is not there.
            ValueError: the index or a file is not as ``export_all`` wrote it, or of another adapter or backbone.
        """
        directory = as_path(directory, "directory")
        files = read_index(directory)
        ids = [id for file in files for id in file.ids]
        if not overwrite:
            there = {id: (0, version) for id, version in zip(ids, self._store.versions(ids)) if version}
            if there:
                raise BankConflict(there)
        for file in files:
            path = directory / file.name
            memory, metadata = load_memory(path, self._model, adopt, "directory")
            if file.sha256 is not None and metadata.get("sha256") != file.sha256:
                raise FileFormatError(f"directory: {path}: damaged: not what the index names (sha256)")
            if memory.batch_size != len(file.ids):
                raise FileFormatError(
                    f"directory: {file.name} holds {memory.batch_size} memories, the index says {len(file.ids)}"
                )
            self.commit(file.ids, memory, overwrite=overwrite)
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
        if any(layer.is_meta for _, layer in state.items()):
            raise ArgumentError("state: is on the meta device, where it has no values")
        state.check_whole()
        self._identity.check(state.identity)
        here = self._store.name
        swapped = [
            (n, f"{row[0]!r}{'' if row[2] == here else ' in another bank'}", id)
            for n, (row, id) in enumerate(zip(state.bank_rows, ids))
            if row and (row[0], row[2]) != (id, here)
        ]
        if swapped:
            shown = first_of((f"row {n} is the memory of {owner}, not of {id!r}" for n, owner, id in swapped), 3)
            raise ArgumentError(
                f"ids: {shown}; commit rows under their own ids ({_some(state.ids)}), or state.unnamed() to copy "
                "memories to other ids or banks on purpose"
            )

    def _read(self, ids: builtins.list[str]) -> tuple:
        """Versions, and each layer's state (float32 [B, H, r, r]) and counter (int32 [B]); 0 for unknown ids.

        Rows are taken apart some at a time, while the processor's cache holds them; by numpy, in this thread: for so
        little PyTorch would wait for its pool, 10 ms and more where cores are busy.
        """
        versions = [0] * len(ids)
        # One allocation where layers have one width: 36 of them come and go at glibc's threshold for fresh pages.
        groups = [
            torch.empty(n, len(ids), width, dtype=torch.float32, device="cpu").numpy() for width, n in self._groups
        ]
        states = list(itertools.chain(*groups))
        counters = numpy.empty((len(self._widths), len(ids)), numpy.int32)
        staged = numpy.empty((max(1, min(len(ids), _STAGE_BYTES // (4 * self._words))), self._words), numpy.int32)
        floats = staged.view(numpy.float32)
        data, size, places, sound = memoryview(staged.reshape(-1)).cast("B"), 4 * self._words, [], True

        def take() -> bool:
            rows, first, start = len(places), places[0] if places else 0, 0
            # A slice is much the quicker: all but rows beside unknown ones.
            at = slice(first, first + rows) if places == list(range(first, first + rows)) else numpy.array(places)
            for group, (width, n) in zip(groups, self._groups):
                group[:, at] = floats[:rows, start : start + n * width].reshape(rows, n, width).swapaxes(0, 1)
                start += n * width
            counts = staged[:rows, self._state_words :]
            counters[:, at] = counts.T
            return _all_finite(floats[:rows, : self._state_words]) and bool((counts >= 0).all())

        for place, version, row in self._store.each(ids):
            versions[place] = version
            data[len(places) * size : (len(places) + 1) * size] = row
            places.append(place)
            if len(places) == len(staged):
                sound &= take()
                places.clear()
        sound &= take()
        unknown = [n for n, version in enumerate(versions) if version == 0]
        if unknown:
            for state in states:
                state[unknown] = 0
            counters[:, unknown] = 0
        if not sound:
            self._raise_unsound(ids, states, counters)
        # Each layer's are updated in place, so that none may share a torch storage with another's.
        shapes = [(len(ids), *shape) for shape in self._shapes.values()]
        layers = {i: torch.from_numpy(state).view(shape) for i, state, shape in zip(self._shapes, states, shapes)}
        return versions, layers, {i: torch.from_numpy(counter.copy()) for i, counter in zip(layers, counters)}

    def _raise_unsound(
        self, ids: builtins.list[str], states: Iterable[numpy.ndarray], counters: numpy.ndarray
    ) -> NoReturn:
        """Of rows that no commit writes: damaged while the bank had no checksums, or made by somebody else."""
        good = (counters >= 0).all(0)
        for state in states:
            good &= numpy.isfinite(state).all(1)
        broken = [id for id, fine in zip(ids, good.tolist()) if not fine]
        raise FileFormatError(
            f"bank: {self._store.path}: damaged: the memories of {_some(broken)} hold NaN or Inf, or counts below 0"
        )

    def _words_of(self, state: MemoryState) -> numpy.ndarray:
        """int32 [B, words], the rows of a state."""
        rows, split = state.batch_size, self._state_words
        states = [state[i].detach().reshape(rows, -1) for i in self._shapes]
        counters = [state.counter(i).detach().reshape(rows, 1) for i in self._shapes]
        devices = {part.device for part in states + counters}
        if len(devices) == 1 and devices != {torch.device("cpu")}:
            states, counters = [torch.cat(states, 1)], [torch.cat(counters, 1)]  # one copy from a GPU, not one a layer
        words = numpy.empty((rows, self._words), numpy.int32)
        # PyTorch's cat of so many narrow parts takes half as long again.
        numpy.concatenate([part.cpu().numpy() for part in states], axis=1, out=words[:, :split].view(numpy.float32))
        numpy.concatenate([part.cpu().numpy() for part in counters], axis=1, out=words[:, split:])
        return words


def _all_finite(numbers: numpy.ndarray) -> bool:
    """Whether none of float32 [B, N] is NaN or Inf; by their sum, which is quicker, where that does not overflow."""
    return bool(numpy.isfinite(numpy.einsum("ij->", numbers)) or numpy.isfinite(numbers).all())


def _some(ids: list[str]) -> str:
    return first_of(map(repr, ids))
