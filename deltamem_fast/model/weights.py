"""Which way a layer's attention runs: the fused forward for Llama-shaped attention, or the class's own."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.modules.module as _modules
from torch import nn

from deltamem_kernels.layout import HeadLayout, Steering

from ..adapter.layer import DeltaMemory, refuse_pickling
from .call import MemoryCall
from .families import LlamaShape, bypassed_functions, parts_of, shape_of, why_generic, why_unpackable
from .packing import PackedRows
from .projections import projections_of, rows_of, sizes_in
from .tensor_parallel import Shard, shard_of


@dataclass(frozen=True)
class LayerPath:
    """How one layer's attention runs. ``path`` is ``fast`` or ``generic``; ``reason``, why it is generic, or ""."""

    path: str
    reason: str = ""


class LayerWeights:
    """The packed weights of one layer, and whether its fast path is right.

    Attributes:
        reason: why the layer takes the generic path, or "".
        plain: the weights are not to be packed: they are trained, and may be sharded.
        rows: q, k, v and the memory's rows (generic: the memory's alone), or None: they cannot be packed.
        bias: of q, k and v, zeros for the memory's rows; None: there is none.
        gate_bias: as the kernels take it; None where ``rows`` is.
        first_memory_row: where the memory's rows begin.
        heads: of q, k and v.
        shape: the attention's data.
        output: the name of its last linear.
        corrected: linear → the heads of which it gives the output.
        shards: of each head of which this process has a part: that part (tensor parallelism).
        kept: where a backend keeps what it has made of the layer's weights.
    """

    def __init__(self):
        self.reason = "not looked at yet"
        self.plain = False
        self.rows: PackedRows | None = None
        self.bias: PackedRows | None = None
        self.gate_bias: PackedRows | None = None
        self.first_memory_row = 0
        self.heads: tuple[int, ...] = (0, 0, 0)
        self.shape: LlamaShape | None = None
        self.output = "o_proj"
        self.corrected: dict[str, str] = {}
        self.shards: dict[str, Shard] = {}
        self.kept: dict = {}
        self._layouts: dict[int, HeadLayout] = {}
        self._steering: Steering | None = None
        # What was found where when the path was chosen: dictionaries, keys, objects; the types of attention and parts.
        self._places: tuple[tuple, tuple, tuple] = ((), (), ())
        # The functions that the fused forward goes past: owners (classes, modules), names, functions. Mostly
        # the same in all layers, so that a forward looks at them once.
        self._functions: tuple[tuple, tuple, tuple] = ((), (), ())
        # The packed parameters, and where their rows lie.
        self._packed: tuple[list[nn.Parameter], list[int]] = ([], [])
        self._typed: tuple[nn.Module, ...] = ()
        self._types: tuple[type, ...] = ()
        self._hooks: tuple[dict, ...] = ()
        self._known: list[weakref.ref] = []
        self._lock = threading.RLock()

    def __deepcopy__(self, memo) -> LayerWeights:
        # A copy's weights lie elsewhere: the copied PatchRecord looks at them anew.
        copied = LayerWeights()
        copied.plain, copied.corrected = self.plain, self.corrected
        return copied

    def __reduce_ex__(self, protocol):
        refuse_pickling()

    def refresh(self, attention: nn.Module, layer: DeltaMemory, trusted: bool = True) -> None:
        """Choose the path again and pack the weights for it.

        Args:
            trusted: the parameters are the model's own: at patching, ``.to()``, ``load_state_dict``. Else only those
                known from there are packed: others may be somebody's for the length of a forward (FSDP's gathered
                weights, functional_call's).
        """
        projections = projections_of(type(attention))
        self.corrected = projections.heads
        shards = {head: shard_of(part.linear_weight) for head, part in rows_of(attention).items()}
        self.shards = {head: shard for head, shard in shards.items() if shard is not None}
        if self.plain:
            self.unpack()
            return
        with self._lock:
            reason = why_generic(attention, layer, hooks=False)  # they come and go; ``applies`` looks
            rows = [layer._parameters.get(name) for name in layer.row_names]
            gates = [layer._parameters.get(name) for name in layer.gate_bias_names]
            bias, first = None, 0
            if not reason:
                linears = [attention._modules[name] for name in projections.inputs]
                rows = [linear._parameters["weight"] for linear in linears] + rows
                biases = [linear._parameters["bias"] for linear in linears]
                sizes = [linear.out_features for linear in linears]
                first = sum(sizes)
                outputs = sizes if len(linears) == 3 else sizes_in(attention, linears[0], "qkv")
                self.heads = tuple(size // attention.head_dim for size in outputs)
                if any(b is not None for b in biases):
                    bias = [size if b is None else b for size, b in zip(sizes, biases)] + [layer.rule.width]
            used = [part for part in (*rows, *gates, *(bias or ())) if not isinstance(part, int)]
            if trusted:  # also what is not packed now: the reason may go
                own = [
                    part
                    for name in projections.names
                    for part in getattr(attention._modules.get(name), "_parameters", {}).values()
                ]
                self.know(part for part in (*used, *own) if part is not None)
            elif not all(any(part is known() for known in self._known) for part in used):
                reason = reason or "a weight was replaced after patching"
                rows, first, bias = rows[-len(layer.row_names) :], 0, None
                if not all(any(part is known() for known in self._known) for part in (*rows, *gates)):
                    rows = gates = None
            ours = self.ours()
            if rows is not None and any(why_unpackable("", part, ours) for part in (*rows, *gates)):
                reason, rows, gates, bias = reason or "the memory's weights cannot be packed", None, None, None
            self.reason, self.first_memory_row = reason, first
            self.rows = _packed(self.rows, rows)
            self.bias = _packed(self.bias, bias)
            self.gate_bias = _packed(self.gate_bias, gates)
            self.shape, self.output = shape_of(attention), projections.output
            self._layouts, self._steering, self.kept = {}, None, {}
            self._remember(attention, layer)

    def let_go(self) -> list[nn.Parameter]:
        """Drop the weak references to parameters, which are returned: PyTorch swaps no tensor that has one.

        It swaps those of a class of their own (quantised, sharded) in ``.to()``, and all by
        ``torch.__future__.set_swap_module_params_on_conversion`` in ``load_state_dict``, too. ``refresh`` follows.
        """
        known = [part for reference in self._known if (part := reference()) is not None]
        self._known = []
        return known

    def know(self, parameters: Iterable[nn.Parameter]) -> None:
        """These are the model's own; see ``refresh``."""
        self._known = [weakref.ref(part) for part in parameters]

    def ours(self) -> set[int]:
        """Parameters that are rows of what is packed here."""
        return {id(parameter) for packed in self._packs() for parameter in packed.in_place()}

    def _packs(self) -> list[PackedRows]:
        return [packed for packed in (self.rows, self.gate_bias, self.bias) if packed is not None]

    def _remember(self, attention: nn.Module, layer: DeltaMemory) -> None:
        places = [(attention._modules, name, attention._modules.get(name)) for name in parts_of(attention)]
        parts = [part for _, _, part in places if part is not None]
        self._typed = (*parts, attention)
        self._types = tuple(map(type, self._typed))
        for part in parts:
            attributes = vars(part)
            places += [(part._parameters, name, part._parameters.get(name)) for name in ("weight", "bias")]
            places += [(attributes, n, attributes.get(n)) for n in ("_forward_hooks", "_forward_pre_hooks", "forward")]
        places += [(layer._parameters, name, parameter) for name, parameter in layer._parameters.items()]
        norms = [part for part in parts if "variance_epsilon" in vars(part)]
        places += [(vars(norm), "variance_epsilon", norm.variance_epsilon) for norm in norms]
        places += [(vars(attention), "head_dim", vars(attention).get("head_dim"))]
        bypassed = [(owner, name, getattr(owner, name, None)) for owner, name in bypassed_functions(attention)]
        # A function that a kernel from the hub may stand in for is a module, and gets that as its forward.
        places += [(vars(f), "forward", vars(f).get("forward")) for *_, f in bypassed if isinstance(f, nn.Module)]
        self._places = tuple(zip(*places))
        self._functions = tuple(zip(*bypassed)) if bypassed else ((), (), ())
        packs = self._packs()
        self._packed = [p for pack in packs for p in pack.parameters], [a for pack in packs for a in pack.addresses]
        self._hooks = tuple(hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks))

    def is_current(self, call: MemoryCall | None = None) -> bool:
        """Whether nothing that the choice and the packing rest on has been replaced or moved.

        Args:
            call: the forward that asks; what all layers rest on is looked at by its first.
        """
        if not all(map(operator.is_, map(dict.get, *self._places[:2]), self._places[2])):
            return False
        if call is None or call.bypassed != self._functions:
            if not all(map(operator.is_, map(getattr, *self._functions[:2]), self._functions[2])):
                return False
            if call is not None:
                call.bypassed = self._functions
        if tuple(map(type, self._typed)) != self._types:
            return False
        parameters, addresses = self._packed
        return list(map(torch.Tensor.data_ptr, parameters)) == addresses

    def release(self) -> None:
        """Give every parameter its own storage again."""
        for packed in self._packs():
            packed.release()
        self.rows = self.bias = self.gate_bias = None
        self._packed = [], []

    def unpack(self) -> None:
        """Keep every parameter in storage of its own from now on, until ``plain`` is False again."""
        with self._lock:
            self.plain, self.reason = True, "the model is prepared for training"
            self.release()

    def memory_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory's rows [W, d] and the gates' biases, both as stored and off the autograd graph."""
        rows = self.rows.tensor
        return rows[self.first_memory_row :] if self.first_memory_row else rows, self.gate_bias.tensor

    def layout(self, head_dim: int, rotary: int) -> HeadLayout:
        """The packed row's layout for RoPE over ``rotary`` numbers."""
        found = self._layouts.get(rotary)
        if found is None:
            found = self._layouts[rotary] = HeadLayout(*self.heads, head_dim, rotary)
        return found

    def usable(self, attention: nn.Module, layer: DeltaMemory, call: MemoryCall | None = None) -> bool:
        """Whether the packed rows may stand for the parameters in this call; looks at what has moved."""
        if torch.is_grad_enabled() or self.plain:
            return False
        if torch.compiler.is_compiling():
            # Addresses cannot be asked for here; that each parameter is the one packed is a guard of the graph.
            for places, name, known in zip(*self._places):
                if places.get(name) is not known:
                    return False
            for owner, name, known in zip(*self._functions):
                if getattr(owner, name) is not known:
                    return False
        elif not self.is_current(call):
            self.refresh(attention, layer, trusted=False)
        return self.rows is not None

    def applies(self, hidden_states: torch.Tensor) -> bool:
        """Whether the fused forward is right for this call, its weights being ``usable``."""
        if self.reason or torch.is_autocast_enabled(hidden_states.device.type):
            return False
        return not (any(self._hooks) or _modules._global_forward_hooks or _modules._global_forward_pre_hooks)

    def steering(self, attention: nn.Module, layer: DeltaMemory) -> Steering:
        """What the memory's layer adds to its heads, as the kernels take it."""
        found = self._steering  # another thread may forget it meanwhile
        if found is None:
            parameters, config, norms = layer._parameters, layer.config, self.shape.norms
            heads = config.delta_heads
            q_norm, k_norm = (attention._modules[name] for name in norms) if norms else (None, None)
            found = self._steering = Steering(
                q=parameters["delta_q_proj"] if "q" in heads else None,
                k=parameters["delta_k_proj"] if "k" in heads else None,
                v=parameters["delta_v_proj"] if "v" in heads else None,
                o=parameters["delta_o_proj"] if "o" in heads and not config.delta_o_rmsnorm else None,
                scale=config.scale,
                scale_raw=parameters["delta_scale_raw"] if config.trainable_delta_scale else None,
                scale_max=config.delta_scale_max,
                q_norm=q_norm._parameters["weight"] if norms else None,
                k_norm=k_norm._parameters["weight"] if norms else None,
                eps=q_norm.variance_epsilon if norms else 1e-6,
            )
        return found


def _packed(current: PackedRows | None, parts: list | None) -> PackedRows | None:
    """Packed ``parts``, or None without; the current rows if they are the same, so that nothing is copied twice."""
    if current is not None:
        same = parts is not None and _ids(parts) == _ids(current.parameters)
        if same and current.is_whole():
            return current
        if not same:
            current.release()
    return None if parts is None else PackedRows(parts)


def _ids(parts: list) -> list[int]:
    return [id(part) for part in parts if not isinstance(part, int)]
