"""MemoryState: the memory of a batch of conversations, one float32 [B, H, r, r] tensor per layer."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .arguments import check_integer
from .errors import (
    ArgumentError,
    ArgumentIndexError,
    ArgumentKeyError,
    ArgumentTypeError,
    FileFormatError,
    FileMissingError,
    StateError,
)
from .files import read_tensors, write_atomically
from .record import LayerSpec, describe_difference, identity_of

FORMAT = "deltamem-memory"
FORMAT_VERSION = 1


class MemoryState:
    """Memories of B conversations. ``memory[layer_idx]`` is the live float32 [B, H, r, r] state of a layer.

    A forward of a patched model reads and writes the one it is given (``memory=``), or the one its cache holds
    (``memory_state(cache)``). Outside autograd the tensors are updated in place and keep their address; under
    autograd they are replaced, and carry the graph.

    Attributes:
        frozen: True makes it read-only: forwards read it and write nothing.
        skipped: int32 [B], how many (token, layer) pairs were not written because a projection was NaN or Inf.
    """

    def __init__(self, layers: dict[int, torch.Tensor], *, identity=None, frozen: bool = False, skipped=None):
        sizes = {int(state.shape[0]) for state in layers.values()}
        if len(sizes) > 1:
            raise ArgumentError(f"layers: got differing batch sizes {sorted(sizes)}, allowed one")
        self._layers = dict(layers)
        self._skipped = dict(skipped) if skipped is not None else {i: _counter(s) for i, s in layers.items()}
        self._arrived = {i: _counter(s) for i, s in layers.items() if s.is_cuda}
        for i in self._arrived:
            self._keep_in_place(i)
        self._identity = identity
        # Id → version of the MemoryBank rows that this was gathered from; copies keep it, and can be committed.
        self._versions: dict[str, int] = {}
        # Why this memory no longer fits its cache or graph: "" or the reason that the next forward gives.
        self._broken = ""
        # Why layers have written that others have not: "" or the reason that every later use gives.
        self._interrupted = ""
        self.frozen = frozen

    @classmethod
    def zeros(cls, model, batch_size: int = 1) -> MemoryState:
        """An empty memory for ``batch_size`` conversations on a patched model, on the devices of its layers.

        Raises:
            ValueError: the model is not patched, or batch_size < 0.
        """
        check_integer(batch_size, "batch_size", 0)
        identity = identity_of(model)
        layers = {i: spec.zeros(batch_size) for i, spec in identity.layer_specs().items()}
        return cls(layers, identity=identity)

    # --- reading

    def __getitem__(self, layer_idx: int) -> torch.Tensor:
        try:
            return self._layers[layer_idx]
        except (KeyError, TypeError):
            raise ArgumentKeyError(f"layer {layer_idx}: no memory there, only in layers {list(self._layers)}") from None

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __contains__(self, layer_idx: int) -> bool:
        return layer_idx in self._layers

    def items(self):
        """(layer_idx, state) pairs."""
        return self._layers.items()

    @property
    def batch_size(self) -> int:
        """B, the number of conversations."""
        return next((int(state.shape[0]) for state in self._layers.values()), 0)

    @property
    def skipped(self) -> torch.Tensor:
        """int32 [B], (token, layer) pairs left out because they were not finite."""
        counters = list(self._skipped.values())
        if not counters:
            return torch.zeros(0, dtype=torch.int32, device="cpu")
        return torch.stack([counter.to(counters[0].device) for counter in counters]).sum(0, dtype=torch.int32)

    def __repr__(self) -> str:
        shape = list(next(iter(self._layers.values())).shape) if self._layers else []
        return f"MemoryState(layers={list(self._layers)}, shape={shape}, frozen={self.frozen})"

    # --- making others of it

    def _map(self, change) -> MemoryState:
        made = MemoryState(
            {i: change(state) for i, state in self._layers.items()},
            identity=self._identity,
            frozen=self.frozen,
            skipped={i: change(counter) for i, counter in self._skipped.items()},
        )
        made._broken, made._interrupted = self._broken, self._interrupted
        made._versions = dict(self._versions)
        return made

    def clone(self) -> MemoryState:
        """A copy with storage of its own; under autograd it stays on the graph."""
        return self._map(torch.clone)

    def detach(self) -> MemoryState:
        """A copy off the autograd graph."""
        made = self._map(lambda tensor: tensor.detach().clone())
        made._broken = ""
        return made

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> MemoryState:
        """This memory on ``device``: itself if it is there already (as a tensor's ``to``), else a copy.

        Raises:
            TypeError: a dtype was given; a memory is float32 always.
        """
        if isinstance(device, torch.dtype):
            raise ArgumentTypeError(f"device: got {device}, allowed a device (a memory is float32 always)")
        try:
            target = None if device is None else torch.empty(0, device=device).device
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ArgumentError(f"device: got {device!r}, which torch cannot use here ({error})") from error
        if target is None or all(state.device == target for _, state in self.items()):
            return self
        return self._map(lambda tensor: tensor.to(device=target, non_blocking=non_blocking, copy=True))

    def read_only(self) -> MemoryState:
        """A frozen memory over the same tensors: it sees what is written here, and forwards do not write it."""
        made = MemoryState(self._layers, identity=self._identity, frozen=True, skipped=self._skipped)
        made._broken, made._interrupted = self._broken, self._interrupted
        return made

    def select(self, rows) -> MemoryState:
        """The memories of ``rows`` (a list or tensor of indices, or a bool mask), in that order.

        Raises:
            IndexError: a row outside 0 to B − 1.
        """
        try:
            index = torch.as_tensor(rows, device=None if isinstance(rows, torch.Tensor) else "cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ArgumentIndexError(
                f"rows: got {rows!r}, allowed a list or tensor of integers, or a bool mask"
            ) from error
        if index.dtype == torch.bool:
            if tuple(index.shape) != (self.batch_size,):
                raise ArgumentIndexError(f"rows: got a mask of shape {list(index.shape)}, allowed [{self.batch_size}]")
            index = index.nonzero().flatten()
        if index.numel() and (index.is_floating_point() or index.is_complex()):
            raise ArgumentIndexError(f"rows: got {rows!r}, allowed integers or a bool mask")
        index = index.long().reshape(-1)
        if index.numel() and not (0 <= int(index.min()) and int(index.max()) < self.batch_size):
            raise ArgumentIndexError(f"rows: got {index.tolist()}, allowed 0 to {self.batch_size - 1}")
        return self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def repeat(self, times: int) -> MemoryState:
        """Every row ``times`` times in a row (0, 0, 1, 1, …), as ``generate`` expands a batch."""
        check_integer(times, "times", 1)
        return self._map(lambda tensor: tensor.repeat_interleave(times, 0))

    @staticmethod
    def cat(memories: Iterable[MemoryState]) -> MemoryState:
        """One memory with the rows of all of ``memories``, in order.

        Raises:
            ValueError: none given, or their layers or shapes differ.
        """
        try:
            memories = list(memories)
        except TypeError as error:
            raise ArgumentTypeError(f"memories: got {type(memories).__name__}, allowed a list of memories") from error
        if not memories:
            raise ArgumentError("memories: got none, allowed one or more")
        for memory in memories:
            if not isinstance(memory, MemoryState):
                raise ArgumentTypeError(f"memories: got a {type(memory).__name__}, allowed memories")
        first = memories[0]
        for other in memories[1:]:
            if _shapes(other) != _shapes(first) or other.frozen != first.frozen:
                raise ArgumentError(f"memories: {other!r} does not fit {first!r}")
            if first._identity is not None:
                first._identity.check(other._identity)
        layers = {i: torch.cat([m[i] for m in memories]) for i in first}
        skipped = {i: torch.cat([m._skipped[i] for m in memories]) for i in first}
        made = MemoryState(layers, identity=first._identity, frozen=first.frozen, skipped=skipped)
        for memory in memories:
            made._versions |= memory._versions
            made._interrupted = made._interrupted or memory._interrupted
        return made

    def __deepcopy__(self, memo) -> MemoryState:
        # The identity refers to the model's adapter; a copied cache must not copy that.
        copied = MemoryState.__new__(MemoryState)
        memo[id(self)] = copied
        copied._layers = copy.deepcopy(self._layers, memo)
        copied._skipped = copy.deepcopy(self._skipped, memo)
        copied._arrived = copy.deepcopy(self._arrived, memo)
        copied._identity, copied.frozen, copied._broken = self._identity, self.frozen, self._broken
        copied._interrupted = self._interrupted
        copied._versions = dict(self._versions)
        return copied

    def __getstate__(self) -> dict:
        # Pickled without the adapter's weights; such a copy can be used, but not saved.
        return vars(self) | {"_identity": None}

    # --- changing

    def zero_(self) -> MemoryState:
        """Forget everything, in place (under autograd: off the graph); returns itself."""
        for i, state in self._layers.items():
            self.put(i, torch.zeros_like(state), in_place=True)
            self._count(i, -self._skipped[i])
            self._count_arrivals(i)
        self._broken = self._interrupted = ""
        return self

    def check_whole(self) -> None:
        """Raise StateError if an error has cut short a forward that was writing this memory."""
        if self._interrupted:
            raise StateError(self._interrupted)

    def interrupt(self, error: BaseException) -> None:
        """Mark this memory as half-written: from now on its use raises, until ``zero_``."""
        self._interrupted = (
            f"memory: a forward that was to write it was cut short by {type(error).__name__}, so that some layers have "
            "written and others may not have; go back to a copy from before (clone), or zero_()"
        )

    def decay(self, rate: float) -> MemoryState:
        """Let everything fade alike, in place: S ← (1 − rate) S; returns itself.

        Args:
            rate: 0 (nothing changes) to 1 (as ``zero_``, but the counters of skipped tokens stay).

        Raises:
            ValueError: rate is no number from 0 to 1; nothing is changed.
        """
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ArgumentError(f"rate: got {rate!r}, allowed a number from 0 to 1")
        for i, state in self._layers.items():
            self.put(i, state * (1 - rate), in_place=True)
        return self

    def forget(self, model, tokenizer, text, *, strength: float | None = None) -> MemoryState:
        """Erase what a text's keys point to, in place, and write nothing; returns itself. See ``operators.forget``."""
        from .operators import forget

        return forget(model, tokenizer, self, text, strength=strength)

    def put(self, layer_idx: int, state: torch.Tensor, *, in_place: bool) -> None:
        """Set a layer's state; ``in_place`` keeps the address where autograd allows it."""
        current = self._layers.get(layer_idx)
        if in_place and current is not None and current.shape == state.shape and writable(current):
            with torch.no_grad():
                current.copy_(state)
        else:
            self._layers[layer_idx] = state.detach() if in_place else state

    def _count(self, layer_idx: int, more: torch.Tensor) -> None:
        """Add to a layer's count of skipped tokens."""
        counter = self._skipped[layer_idx]
        if writable(counter):
            counter.add_(more)
        else:
            self._skipped[layer_idx] = counter + more

    def _start(self, layer_idx: int, spec: LayerSpec, batch_size: int) -> None:
        self._layers[layer_idx] = spec.zeros(batch_size)
        self._skipped[layer_idx] = _counter(self._layers[layer_idx])
        self._count_arrivals(layer_idx)

    def _count_arrivals(self, layer_idx: int) -> None:
        """Zeros [B] with which the programs of one decoded row tell who is the last; on a GPU only."""
        state = self._layers[layer_idx]
        if not state.is_cuda:
            return
        if layer_idx in self._arrived and self._arrived[layer_idx].shape[0] == state.shape[0]:
            self._arrived[layer_idx].zero_()  # a launch that was cut short may have left something
        else:
            self._arrived[layer_idx] = _counter(state)
        self._keep_in_place(layer_idx)

    def _keep_in_place(self, layer_idx: int) -> None:
        """Tell the compiler that a layer's tensors stay where they are: CUDA graphs refuse to write to others."""
        if torch.compiler.is_compiling():
            return
        for tensor in (self._layers[layer_idx], self._skipped[layer_idx], self._arrived[layer_idx]):
            if tensor.is_leaf:
                # Without a guard: the next conversation's memory lies elsewhere, and needs no other code.
                torch._dynamo.mark_static_address(tensor, guard=False)

    def _gather(self, layer_idx: int, change) -> None:
        """Reorder, repeat or select rows of one layer; keeps the address where the shape stays."""
        if layer_idx in self._layers:
            self.put(layer_idx, change(self._layers[layer_idx]), in_place=True)
            self._count_arrivals(layer_idx)
            counter = change(self._skipped[layer_idx])
            if counter.shape == self._skipped[layer_idx].shape and writable(self._skipped[layer_idx]):
                self._skipped[layer_idx].copy_(counter)
            else:
                self._skipped[layer_idx] = counter

    # --- looking inside

    def report(self):
        """Figures of every layer and head, as an ``inspection.report.MemoryReport``; ``print`` it to read it."""
        from .inspection.report import report

        return report(self)

    # --- files

    def save(self, path: str | os.PathLike) -> Path:
        """Write to a safetensors file, atomically, with the fingerprints of adapter and backbone.

        Raises:
            ValueError: this memory was made without a model, so there is nothing to fingerprint.
        """
        from safetensors.torch import save_file

        self.check_whole()
        if self._identity is None:
            raise ArgumentError("memory: made without a model, so it has no adapter to be saved for")
        tensors = {f"layers.{i}.state": state.detach().cpu().contiguous() for i, state in self._layers.items()}
        counters = list(self._skipped.values())
        tensors["skipped"] = (
            torch.stack([c.cpu() for c in counters]) if counters else torch.zeros(0, 0, dtype=torch.int32, device="cpu")
        )
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "layers": json.dumps({str(i): list(state.shape[1:]) for i, state in self._layers.items()}),
            "frozen": json.dumps(self.frozen),
            **self._identity.fingerprints(),
        }
        return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike, model) -> MemoryState:
        """Read a memory that ``save`` wrote, onto the devices of ``model``'s layers.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a memory file, a newer format, or one saved under another adapter or backbone;
                the message names both.
        """
        identity = identity_of(model)
        if not Path(path).is_file():
            raise FileMissingError(f"path: {path}: no such file")
        metadata, tensors = read_tensors(path, "path")
        _check_metadata(path, metadata, identity)
        specs = identity.layer_specs()
        saved = {int(i): tuple(shape) for i, shape in json.loads(metadata["layers"]).items()}
        wanted = {i: (spec.heads, spec.rank, spec.rank) for i, spec in specs.items()}
        if saved != wanted:
            raise FileFormatError(f"path: {path}: holds layers {saved}, the model's are {wanted}")
        layers = {i: tensors[f"layers.{i}.state"].to(spec.device) for i, spec in specs.items()}
        skipped = {i: tensors["skipped"][n].to(spec.device) for n, (i, spec) in enumerate(specs.items())}
        return cls(layers, identity=identity, frozen=json.loads(metadata["frozen"]), skipped=skipped)


def writable(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be updated in place here: not on an autograd graph, nor an inference tensor outside."""
    if tensor.requires_grad:
        return False
    if torch.compiler.is_compiling():
        return True
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


def written(tensor: torch.Tensor) -> None:
    """Say that a tensor was changed by its address: a backward that has saved it raises instead of using it."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensor)


def _counter(state: torch.Tensor) -> torch.Tensor:
    return torch.zeros(state.shape[0], dtype=torch.int32, device=state.device)


def _shapes(memory: MemoryState) -> dict[int, list[int]]:
    return {i: list(state.shape[1:]) for i, state in memory.items()}


def _check_metadata(path, metadata: dict[str, str], identity) -> None:
    if metadata.get("format") != FORMAT:
        raise FileFormatError(
            f"path: {path}: not a memory file (format {metadata.get('format')!r}, allowed {FORMAT!r})"
        )
    version = metadata.get("format_version", "")
    if not version.isdigit() or not 1 <= int(version) <= FORMAT_VERSION:
        raise FileFormatError(f"path: {path}: format version {version!r}, this version reads 1 to {FORMAT_VERSION}")
    difference = describe_difference(metadata, identity.fingerprints())
    if difference:
        raise FileFormatError(f"path: {path}: saved under {difference}")
