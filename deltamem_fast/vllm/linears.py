"""The projections of an attention with a memory: what is read corrects q, k, v and o."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from deltamem_kernels.dispatch import operations

from ..adapter.layer import DeltaMemory
from ..config import DELTA_HEADS
from ..errors import UnsupportedError
from .states import States


def at_once(device: torch.device) -> bool:
    """Whether one operator reads, writes and corrects all.

    On a CPU, where a compiler would copy q, k and v for each correction, and then once more as a whole. On a GPU only
    what looks at the step's plan is left out of CUDA graphs.
    """
    return device.type == "cpu"


class _Link:
    """What the input's projection hands to the output's in one forward, [T, …]: Δo if it is made at once, or the reads.

    Attributes:
        at_once: whether it is.
        handed: of this forward.
    """

    def __init__(self, at_once: bool):
        self.at_once = at_once
        self.handed: torch.Tensor | None = None


class QKVWithMemory(QKVParallelLinear):
    """q, k and v of an attention with a memory: reads, writes, and adds Δq, Δk and Δv."""

    def forward(self, input_):
        found = super().forward(input_)
        output = found[0] if isinstance(found, tuple) else found
        projections = F.linear(input_.reshape(-1, input_.shape[-1]), self.memory_rows)
        rows = output.view(-1, output.shape[-1])
        if self.link.at_once:
            handed = torch.empty(rows.shape[0], self.out_rows, dtype=rows.dtype, device=rows.device)
            torch.ops.vllm.deltamem_advance_and_steer(projections, self.gate_bias, rows, handed, self.states_name)
        else:
            # Made here: what runs between two CUDA graphs has to leave its results where they look for them.
            handed = torch.empty(rows.shape[0], self.read_width, dtype=torch.float32, device=rows.device)
            torch.ops.vllm.deltamem_advance(projections, self.gate_bias, handed, self.states_name)
            self.steer(rows, handed)
        self.link.handed = handed if self.out_rows else None
        return found

    def steer(self, rows: torch.Tensor, reads: torch.Tensor) -> None:
        """Add Δq, Δk and Δv of reads [T, H·r] to rows [T, q | k | v], where they lie."""
        for name, first, width, scale in self.spans:
            _add(rows.narrow(1, first, width), reads, getattr(self, name), scale)


class OutputWithMemory(RowParallelLinear):
    """o of an attention with a memory: adds Δo, after the sum over ranks."""

    def forward(self, input_):
        found = super().forward(input_)
        handed, self.link.handed = self.link.handed, None
        output = found[0] if isinstance(found, tuple) else found
        rows = output.view(-1, output.shape[-1])
        if self.link.at_once:
            rows.add_(handed)
        else:
            _add(rows, handed, self.delta_o, self.delta_scale, self.delta_norm, self.delta_eps)
        return found

    def write_delta(self, delta: torch.Tensor, reads: torch.Tensor) -> None:
        """delta [T, out] = Δo of reads [T, H·r]."""
        if self.delta_norm is None and delta.dtype == torch.float32:
            torch.addmm(delta, reads, self.delta_o.t(), beta=0, alpha=self.delta_scale, out=delta)
        else:
            found = operations("auto", reads.device).delta(
                reads, self.delta_o, self.delta_scale, delta.dtype, norm_weight=self.delta_norm, eps=self.delta_eps
            )
            delta.copy_(found)


def _add(rows, reads, weight, scale: float, norm_weight=None, eps: float = 0.0) -> None:
    """Add Δ = scale · W reads, normalised if there is a weight for that, to rows [T, out], where they lie."""
    if norm_weight is None and rows.dtype == torch.float32:
        rows.addmm_(reads, weight.t(), alpha=scale)
    else:
        steer = operations("auto", rows.device).steer
        rows.copy_(steer(rows, reads, weight, scale, norm_weight=norm_weight, eps=eps))


def give_memory(attention: nn.Module, name: str, states: States, memory: DeltaMemory) -> None:
    """Make the projections of an attention those of one with a memory.

    Args:
        attention: with ``qkv_proj`` and ``o_proj``.
        name: of it, for messages.
        states: the layer's.
        memory: the adapter's layer on the CPU, with its weights.

    Raises:
        ValueError: its projections are of other kinds.
    """
    qkv, out = (_linear(attention, name, which, kind) for which, kind in (
        ("qkv_proj", QKVParallelLinear), ("o_proj", RowParallelLinear),
    ))  # fmt: skip
    config, heads = memory.config, memory.config.delta_heads
    device, dtype = qkv.weight.device, qkv.params_dtype
    link = _Link(at_once(device))
    operations("auto", device)  # found now, and not while a compiler traces

    def buffer(module: nn.Module, key: str, value: torch.Tensor, dtype: torch.dtype = dtype) -> None:
        # No parameter, and in no checkpoint: vLLM looks for those of a model there.
        module.register_buffer(key, value.detach().to(device, dtype).contiguous(), persistent=False)

    rows, bias = memory.stacked()
    buffer(qkv, "memory_rows", rows)
    buffer(qkv, "gate_bias", bias, torch.float32)  # as gates are computed
    qkv.link, qkv.states_name = link, states.name
    qkv.read_width = memory.rule.read_width
    qkv.spans, first = [], 0
    for head, width, rank in _shares(qkv):
        if head in heads:
            weight = getattr(memory, f"delta_{head}_proj")
            buffer(qkv, f"delta_{head}", weight.narrow(0, rank * width, width))
            qkv.spans.append((f"delta_{head}", first, width, _scale(memory, head)))
        first += width
    qkv.__class__ = QKVWithMemory
    by_head = {key[-1]: (first, getattr(qkv, key), scale) for key, first, _, scale in qkv.spans}
    qkv.out_rows = 0
    if "o" in heads:
        _give_output(out, memory, link, buffer)
        qkv.out_rows = out.delta_o.shape[0]
        by_head["o"] = (0, out.delta_o, out.delta_scale)

    def steer(rows: torch.Tensor, delta: torch.Tensor, reads: torch.Tensor) -> None:
        qkv.steer(rows, reads)
        if delta.shape[1]:
            out.write_delta(delta, reads)

    states.steer = steer
    states.corrections = None if config.delta_o_rmsnorm else [by_head.get(head) for head in "qkvo"]


def _give_output(out: nn.Module, memory: DeltaMemory, link: _Link, buffer) -> None:
    config = memory.config
    buffer(out, "delta_o", memory.delta_o_proj)
    if config.delta_o_rmsnorm:
        buffer(out, "delta_norm", memory.delta_o_rmsnorm_weight)
    else:
        out.delta_norm = None
    out.link, out.delta_scale, out.delta_eps = link, _scale(memory, "o"), config.delta_o_rmsnorm_eps
    out.__class__ = OutputWithMemory


def projected_sizes(attention: nn.Module, name: str) -> dict[str, int]:
    """The size of each projection's output over all ranks, by head; errors as of ``give_memory``."""
    qkv = _linear(attention, name, "qkv_proj", QKVParallelLinear)
    out = _linear(attention, name, "o_proj", RowParallelLinear)
    values = qkv.total_num_kv_heads * getattr(qkv, "v_head_size", qkv.head_size)
    keys = qkv.total_num_kv_heads * qkv.head_size
    return {"q": qkv.total_num_heads * qkv.head_size, "k": keys, "v": values, "o": out.output_size}


def _linear(attention: nn.Module, name: str, which: str, kind: type[nn.Module]) -> nn.Module:
    found = getattr(attention, which, None)
    if type(found) is not kind:
        raise UnsupportedError(
            f"model: {name}.{which} is {type(found).__name__}, allowed with a delta-mem adapter: {kind.__name__}"
        )
    return found


def _shares(qkv: QKVParallelLinear) -> list[tuple[str, int, int]]:
    """(head, numbers that this rank has, which share of all they are) of q, k and v."""
    rank = qkv.tp_rank
    shared = rank // qkv.num_kv_head_replicas
    keys = qkv.num_kv_heads * qkv.head_size
    values = qkv.num_kv_heads * getattr(qkv, "v_head_size", qkv.head_size)
    return [("q", qkv.num_heads * qkv.head_size, rank), ("k", keys, shared), ("v", values, shared)]


def _scale(memory: DeltaMemory, head: str) -> float:
    """α / r times the learnt factor, if there is one."""
    config = memory.config
    if not config.trainable_delta_scale:
        return config.scale
    raw = memory.delta_scale_raw.detach().float()
    index = DELTA_HEADS.index(head) if config.delta_scale_granularity == "head" else 0
    return config.scale * float(torch.sigmoid(raw[index])) * config.delta_scale_max
