"""MemoryState: the memory of a batch of conversations, one float32 [B, H, r, r] tensor per layer."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ..adapter.identity import LayerSpec, fingerprinted
from ..adapter.record import identity_of
from ..arguments import MOST, check_integer, shown
from ..errors import ArgumentError, ArgumentIndexError, ArgumentKeyError, ArgumentTypeError, FileFormatError, StateError
from .figures import DistanceReport, MemoryReport, distance, norm_of, report
from .file import check_made_under, read_memory, whole_counts, write_memory
from .telling import erase


class MemoryState:
    """Memories of B conversations. ``memory[layer_idx]`` is the live float32 [B, H, r, r] state of a layer.

    A forward of a patched model reads and writes the one it is given (``memory=``), or the one its cache holds
    (``memory_state(cache)``). Outside autograd the tensors are updated in place and keep their address; under
    autograd they are replaced, and carry the graph.

    Attributes:
        frozen: True makes it read-only: forwards read it and write nothing, and what would change it (``ingest``,
            ``revise``, ``forget``, ``decay``, ``zero_``) raises. May be set.
        skipped: int32 [B], how many (token, layer) pairs were not written, because a projection or the state after it
            would be NaN or Inf; 2**31 − 1 also stands for more. (Each layer counts in an int32, to which kernels add.
            Saving, and a bank, keep one that has gone past its end at it; one that nobody saved for 2**32 begins anew.)
    """

    # Of memories that were pickled by versions that did not have them.
    _interrupted: str = ""
    _rows: tuple | None = None
    _untrusted: int = 0

    def __init__(self, layers: dict[int, torch.Tensor], *, identity=None, frozen: bool = False, skipped=None):
        if not isinstance(layers, dict) or not all(isinstance(s, torch.Tensor) and s.dim() for s in layers.values()):
            raise ArgumentTypeError(
                f"layers: got {shown(layers)}, allowed a dict of layer index → [B, heads, rank, rank]"
            )
        sizes = {int(state.shape[0]) for state in layers.values()}
        if len(sizes) > 1:
            raise ArgumentError(f"layers: got differing batch sizes {sorted(sizes)}, allowed one")
        self._layers = dict(layers)
        self._skipped = dict(skipped) if skipped is not None else {i: _counter(s) for i, s in layers.items()}
        self._arrived = {i: _counter(s) for i, s in layers.items() if s.is_cuda}
        for i in self._arrived:
            self._keep_in_place(i)
        self._identity = identity
        # (id, version, bank) of the MemoryBank row that each of these was gathered from, None for others; None: no row
        # was.
        self._rows: tuple[tuple[str, int, str] | None, ...] | None = None
        # Why this memory no longer fits its cache or graph: "" or the reason that the next forward gives.
        self._broken = ""
        # Why layers have written that others have not: "" or the reason that every later use gives.
        self._interrupted = ""
        self._untrusted = 0
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
            raise ArgumentKeyError(
                f"layer {shown(layer_idx)}: no memory there, only in layers {list(self._layers)}"
            ) from None

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
        return whole_counts(self.counters()).sum(0, dtype=torch.int64).clamp(max=MOST).to(torch.int32)

    def counters(self) -> torch.Tensor:
        """A copy of the layers' counters behind ``skipped``, int32 [L, B]; one past the last int32 is less than 0."""
        counters = list(self._skipped.values())
        if not counters:
            return torch.zeros(0, 0, dtype=torch.int32, device="cpu")
        return torch.stack([counter.to(counters[0].device) for counter in counters])

    def skipped_since(self, counters: torch.Tensor) -> int:
        """How many pairs all rows have left out since ``counters()``, also past the last int32; on a GPU it waits."""
        # int32 differences are right by themselves: both have wrapped around alike.
        return int((self.counters() - counters).sum(dtype=torch.int64))

    @property
    def identity(self):
        """Of the adapter and backbone that this memory was made under; None: it was made without a model."""
        return self._identity

    @property
    def broken(self) -> str:
        """Why this memory no longer fits its cache or graph, or ""."""
        return self._broken

    @property
    def ids(self) -> list[str | None]:
        """Of each row the id under which a MemoryBank has it, or None where it came from no bank."""
        return [None if row is None else row[0] for row in self._rows or (None,) * self.batch_size]

    def __repr__(self) -> str:
        """Norm is that of all states together."""
        first = next(iter(self._layers.values()), None)
        parts = [f"batch_size={self.batch_size}", f"layers={_few(list(self._layers))}"]
        if first is not None:
            parts += [f"shape={list(first.shape)}", f"norm={_norm(self._layers)}"]
            parts.append(f"device={', '.join(sorted({str(state.device) for state in self._layers.values()}))}")
        parts.append(f"adapter={None if self._identity is None else self._identity.adapter_name!r}")
        return f"MemoryState({', '.join(parts)}, frozen={self.frozen})"

    # --- making others of it

    def _map(self, change, rows: list | None = None) -> MemoryState:
        """``change`` of every tensor; ``rows``: what the rows are then called, if these here have names."""
        layers, skipped = ({i: change(t) for i, t in part.items()} for part in (self._layers, self._skipped))
        made = MemoryState(layers, identity=self._identity, frozen=self.frozen, skipped=skipped)
        made._broken, made._interrupted = self._broken, self._interrupted
        made._rows = self._rows if rows is None or self._rows is None else tuple(rows)
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
            ValueError: there is no such device here.
        """
        if isinstance(device, torch.dtype):
            raise ArgumentTypeError(f"device: got {device}, allowed a device (a memory is float32 always)")
        target = None if device is None else place_of(device)
        if target is None or all(state.device == target for _, state in self.items()):
            return self
        return self._map(lambda tensor: tensor.to(device=target, non_blocking=non_blocking, copy=True))

    def read_only(self) -> MemoryState:
        """A frozen memory over the same tensors: it sees what is written here, and forwards do not write it."""
        made = MemoryState(self._layers, identity=self._identity, frozen=True, skipped=self._skipped)
        made._broken, made._interrupted, made._rows = self._broken, self._interrupted, self._rows
        return made

    def unnamed(self) -> MemoryState:
        """A copy that has forgotten which rows of a MemoryBank it came from, to store it under another id on purpose.

        ``bank.commit(["ada-before"], bank.gather(["ada"]).unnamed())``
        """
        made = self.clone()
        made._rows = None
        return made

    def select(self, rows) -> MemoryState:
        """The memories of ``rows`` (a list or tensor of indices, or a bool mask), in that order.

        Raises:
            IndexError: a row outside 0 to B − 1.
        """
        allowed = "allowed a list or tensor of integers, or a mask"
        if isinstance(rows, str | bytes | Mapping):
            raise ArgumentTypeError(f"rows: got {shown(rows)}, {allowed}")
        try:
            index = rows if isinstance(rows, torch.Tensor) else torch.as_tensor(list(rows), device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ArgumentTypeError(f"rows: got {shown(rows)}, {allowed}") from error
        if index.dtype == torch.bool:
            if tuple(index.shape) != (self.batch_size,):
                raise ArgumentIndexError(f"rows: got a mask of shape {list(index.shape)}, allowed [{self.batch_size}]")
            index = index.nonzero().flatten()
        if index.numel() and (index.is_floating_point() or index.is_complex()):
            raise ArgumentIndexError(f"rows: got {shown(rows)}, allowed integers or a bool mask")
        index = index.long().reshape(-1)
        if index.numel() and not (0 <= int(index.min()) and int(index.max()) < self.batch_size):
            raise ArgumentIndexError(f"rows: got {index.tolist()}, allowed 0 to {self.batch_size - 1}")
        names = None if self._rows is None else [self._rows[n] for n in index.tolist()]
        return self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)), names)

    def repeat(self, times: int) -> MemoryState:
        """Every row ``times`` times in a row (0, 0, 1, 1, …), as ``generate`` expands a batch."""
        check_integer(times, "times", 1)
        names = [row for row in self._rows or () for _ in range(times)]
        return self._map(lambda tensor: tensor.repeat_interleave(times, 0), names)

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
            made._interrupted = made._interrupted or memory._interrupted
            made._broken = made._broken or memory._broken
        if any(memory._rows is not None for memory in memories):
            made._rows = tuple(row for m in memories for row in (m._rows or (None,) * m.batch_size))
        return made

    def __deepcopy__(self, memo) -> MemoryState:
        # The identity refers to the model's adapter; a copied cache must not copy that.
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._layers = copy.deepcopy(self._layers, memo)
        copied._skipped = copy.deepcopy(self._skipped, memo)
        copied._arrived = copy.deepcopy(self._arrived, memo)
        return copied

    def __copy__(self) -> MemoryState:
        copied = MemoryState.__new__(MemoryState)
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> dict:
        # Without the adapter's weights: by its fingerprints such a copy knows whose it is.
        made_under = None if self._identity is None else self._identity.described()
        return vars(self) | {"_identity": None, "_made_under": made_under}

    def __setstate__(self, values: dict) -> None:
        made_under = values.pop("_made_under", None)  # versions before had none
        vars(self).update(values)
        if any(row is not None and len(row) < 3 for row in self._rows or ()):  # of versions that did not name the bank
            self._rows = None
        self._identity = None if made_under is None else fingerprinted(made_under)

    # --- changing

    def zero_(self) -> MemoryState:
        """Forget everything, in place (under autograd: off the graph); returns itself.

        Raises:
            ValueError: it is frozen; nothing is changed.
        """
        self.check_writable()
        self._interrupted = (
            "memory: zero_() was cut short, so that some layers are empty and others are not; zero_() it"
        )
        for i, state in self._layers.items():
            self.put(i, torch.zeros_like(state), in_place=True)
            self.count(i, -self._skipped[i])
            self._count_arrivals(i)
        self._broken = self._interrupted = ""
        return self

    def start_over(self) -> None:
        """The cache that this memory lies in is emptied: what was wrong with it, and whose rows it had, is over."""
        self._broken = self._interrupted = ""
        self._rows = None

    def check_writable(self) -> None:
        """Raise ArgumentError if this memory is frozen."""
        if self.frozen:
            raise ArgumentError("memory: it is frozen (read-only), allowed one that may be written")

    def check_whole(self) -> None:
        """Raise StateError if an error has cut short a forward that was writing this memory."""
        if self._interrupted:
            raise StateError(self._interrupted)

    @property
    def is_untrusted(self) -> bool:
        """Whether what is written now is a text that has less than whole trust."""
        return self._untrusted > 0

    @contextlib.contextmanager
    def untrusted(self) -> Iterator[None]:
        """Inside, forwards that write this memory are guarded, if ``patch_model(guard="auto")`` says so."""
        self._untrusted += 1
        try:
            yield
        finally:
            self._untrusted -= 1

    def break_off(self, reason: str) -> None:
        """Mark this memory as one that fits its graph no more: the next differentiable use says ``reason``."""
        self._broken = reason

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
            ValueError: rate is no number from 0 to 1, or the memory is frozen; nothing is changed.
        """
        self.check_writable()
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ArgumentError(f"rate: got {shown(rate)}, allowed a number from 0 to 1")
        with self.all_or_nothing():
            for i, state in self._layers.items():
                self.put(i, state * (1 - rate), in_place=True)
        return self

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Inside, this memory changes wholly or not at all: any exception takes it back to what it was, at its
        addresses."""
        parts = (self._layers, self._skipped)
        before = [{i: (tensor, tensor.detach().clone()) for i, tensor in part.items()} for part in parts]
        marks = self._broken, self._interrupted
        try:
            yield
        except BaseException:
            for part, kept in zip(parts, before):
                for i, (tensor, values) in kept.items():
                    if writable(tensor):  # others were not written to, but replaced
                        with torch.no_grad():
                            tensor.copy_(values)
                    part[i] = tensor
            for i in self:
                self._count_arrivals(i)
            self._broken, self._interrupted = marks
            raise

    def forget(self, model, tokenizer, text, *, strength: float | None = None):
        """Erase what a text has written, in place, and write nothing. See ``operators.forget``.

        Returns:
            A ``WriteResult``.
        """
        return erase(model, tokenizer, self, text, strength)

    def put(self, layer_idx: int, state: torch.Tensor, *, in_place: bool) -> None:
        """Set a layer's state; ``in_place`` keeps the address where autograd allows it."""
        if in_place:
            _put_in_place(self._layers, layer_idx, state)
        else:
            self._layers[layer_idx] = state

    def counter(self, layer_idx: int) -> torch.Tensor:
        """A layer's live count of tokens that were not written, int32 [B]; see ``skipped``."""
        return self._skipped[layer_idx]

    def arrivals(self, layer_idx: int) -> torch.Tensor | None:
        """On a GPU a layer's int32 [B] zeros with which the programs of one decoded row tell who is the last."""
        return self._arrived.get(layer_idx)

    def count(self, layer_idx: int, more: torch.Tensor) -> None:
        """Add ``more``, integers [B], to a layer's count of tokens that were not written."""
        counter = self._skipped[layer_idx]
        if writable(counter):
            counter.add_(more)
        else:
            self._skipped[layer_idx] = counter + more

    def count_in_all(self, layers: list[int], more: torch.Tensor) -> None:
        """``count`` the same in several layers; in one launch where they lie on one device."""
        counters = [self._skipped[i] for i in layers]
        if {counter.device for counter in counters} == {more.device} and all(map(writable, counters)):
            torch._foreach_add_(counters, [more] * len(counters))
            return
        for i in layers:
            self.count(i, more.to(self._skipped[i].device))

    def start(self, layer_idx: int, spec: LayerSpec, batch_size: int) -> None:
        """Give a layer an empty state of ``batch_size`` rows, on new tensors."""
        self._rows = None
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

    def move_rows(self, layer_idx: int, change) -> None:
        """Reorder, repeat or select rows of one layer, as its cache does; keeps the address where the shape stays.

        Args:
            change: of a tensor [B, …] → its rows as they are to be.
        """
        if layer_idx in self._layers:
            if self._rows is not None and layer_idx == next(iter(self._layers)):  # once for all layers
                places = change(torch.arange(self.batch_size, device=self._layers[layer_idx].device)).tolist()
                self._rows = tuple(self._rows[place] for place in places)
            self.put(layer_idx, change(self._layers[layer_idx]), in_place=True)
            self._count_arrivals(layer_idx)
            _put_in_place(self._skipped, layer_idx, change(self._skipped[layer_idx]))

    # --- looking inside

    def report(self, row: int | None = None) -> MemoryReport:
        """Figures of every layer and head, of all conversations or of one; ``print`` it to read it.

        Raises:
            ValueError: no such row.
        """
        return report(self, self._skipped, row)

    def diff(self, other: MemoryState, row: int | None = None) -> DistanceReport:
        """How far each layer and head is from another memory's; ``print`` it to read it.

        Args:
            row: that conversation of each; None = all, of which both have as many.

        Raises:
            TypeError, ValueError: no memory; of other layers or shapes; no such row.
        """
        if not isinstance(other, MemoryState):
            raise ArgumentTypeError(f"other: got {type(other).__name__}, allowed a MemoryState")
        return distance(self, other, row)

    # --- files

    def save(self, path: str | os.PathLike) -> Path:
        """Write to a safetensors file, atomically, with the fingerprints of adapter and backbone and a checksum.

        A new file is its user's alone (0600); one that is there keeps its mode.

        Raises:
            ValueError: this memory was made without a model, so there is nothing to fingerprint, or it holds NaN or
                Inf; nothing is written.
            OSError: it cannot be written; an old file stands.
        """
        self.check_whole()
        if self._identity is None:
            raise ArgumentError("memory: made without a model, so it has no adapter to be saved for")
        return write_memory(path, self._layers, self._skipped, self.frozen, self._identity.fingerprints())

    @classmethod
    def load(cls, path: str | os.PathLike, model, *, adopt: bool = False) -> MemoryState:
        """Read a memory that ``save`` wrote, onto the devices of ``model``'s layers.

        Args:
            adopt: True takes a memory of another adapter or backbone too, if its shapes fit: for one that you know to
                be the model's, such as an old file whose fingerprint no longer matches. What a memory means, only its
                own adapter knows. Saved again, it is the model's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a memory file, damaged, of a newer format, or saved under another adapter or backbone; the
                message names both, and what differs.
        """
        return load_memory(path, model, adopt, kind=cls)[0]

    # --- the rows of a MemoryBank

    @property
    def bank_rows(self) -> tuple[tuple[str, int, str] | None, ...]:
        """Of each row the (id, version, bank's name) that a MemoryBank gathered it at, or None."""
        return self._rows or (None,) * self.batch_size

    def name_rows(self, rows: Iterable[tuple[str, int, str]]) -> None:
        """Say of all rows which of a MemoryBank they are; see ``bank_rows``."""
        self._rows = tuple(rows)


def load_memory(
    path: str | os.PathLike, model, adopt: bool, name: str = "path", kind: type[MemoryState] = MemoryState
) -> tuple[MemoryState, dict[str, str]]:
    """``MemoryState.load``, and the file's metadata; ``name`` is the argument that an error names."""
    identity = identity_of(model)
    specs = identity.layer_specs()
    wanted = {i: spec.shape for i, spec in specs.items()}

    def check(metadata, shapes) -> None:
        if not adopt:
            check_made_under(metadata, identity.fingerprints(), adopt, f"{name}: {path}: saved under")
        if shapes != wanted:
            raise FileFormatError(f"{name}: {path}: holds layers {_short(shapes)}, the model's are {_short(wanted)}")

    content = read_memory(path, name, check)
    layers = {i: content.layers[i].to(spec.device) for i, spec in specs.items()}
    skipped = {i: content.skipped[i].to(spec.device) for i, spec in specs.items()}
    return kind(layers, identity=identity, frozen=content.frozen, skipped=skipped), content.fingerprints


def place_of(device: torch.device | str | int) -> torch.device:
    """A device with its index ("cuda" is the current one), which is here and can hold tensors.

    Raises:
        ValueError: there is no such device.
    """
    try:
        return torch.empty(0, dtype=torch.float32, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ArgumentError(f"device: got {shown(device)}, allowed a device of this machine: {reason}") from error


def taken_back(memory: MemoryState | None) -> contextlib.AbstractContextManager:
    """``memory.all_or_nothing()``; of anything else, nothing."""
    return memory.all_or_nothing() if isinstance(memory, MemoryState) else contextlib.nullcontext()


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


def _put_in_place(part: dict[int, torch.Tensor], layer_idx: int, values: torch.Tensor) -> None:
    """Set a layer's tensor, at the same address where shape and autograd allow it."""
    current = part.get(layer_idx)
    if current is not None and current.shape == values.shape and writable(current):
        with torch.no_grad():
            current.copy_(values)
    else:
        part[layer_idx] = values.detach()


def _shapes(memory: MemoryState) -> dict[int, list[int]]:
    return {i: list(state.shape[1:]) for i, state in memory.items()}


def _short(shapes: dict[int, tuple[int, ...]]) -> str:
    """Layers and their shapes; where all are alike, once."""
    alike = len(set(shapes.values())) == 1
    return f"{_few(list(shapes))} of {list(next(iter(shapes.values())))}" if alike else str(shapes)


def _few(layers: list[int]) -> str:
    """Layer indices; many in a row as their ends."""
    in_a_row = len(layers) > 8 and layers == list(range(layers[0], layers[-1] + 1))
    return f"[{layers[0]}, ..., {layers[-1]}]" if in_a_row else str(layers)


def _norm(states: Mapping[int, torch.Tensor]) -> str:
    """‖all states‖ as text; "?" where there are no values to be had: on meta, while a graph is captured or traced."""
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if captured or torch.compiler.is_compiling() or any(state.is_meta for state in states.values()):
        return "?"
    try:
        return f"{norm_of(states):.4g}"
    except Exception:  # a repr must not raise, whatever tensors these are
        return "?"
