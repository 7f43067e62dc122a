"""One layer's states as a layer of vLLM's: what it caches, what a step's metadata is, and the operator that runs it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata, MultipleOf

from deltamem_kernels.dispatch import operations
from deltamem_kernels.rule import DeltaRule

from ..errors import UnsupportedError
from .advance import advance_blocks, step_blocks
from .cache import StateSpec
from .plan import NOTHING, READS, WRITES, Plan, make_plan
from .requests import Requests

_USES = {"write": WRITES, "read": READS, "none": NOTHING}


class States(nn.Module, AttentionLayerBase):
    """One layer's states in vLLM's cache.

    Attributes:
        name: the layer's, unique in the model.
        rule: of the recurrence.
        cache: float32 [blocks, H, r, r] once vLLM has bound it, None before.
        requests: of the whole model, which memory each request brought along.
        place: among the model's layers with a memory.
        corrections: of q, k, v and o, as numba's ``BlockStep`` takes them; None: as it does not.
        steer: (rows [T, q | k | v], delta [T, out], reads [T, H·r]): adds Δq, Δk and Δv to rows, and writes Δo; None
            until the layer has its weights.
        step: the backend's way to take a decoded token in one call; None: it has none.
    """

    supports_dcp = False

    def __init__(self, name: str, requests: Requests, vllm_config: VllmConfig):
        super().__init__()
        self.name = name
        self.rule: DeltaRule = requests.rule
        self.requests = requests
        self.place = len(requests.layers)
        requests.layers.append(self)
        self.kv_cache = torch.tensor([])
        self.cache: torch.Tensor | None = None
        self.corrections: list[tuple[int, torch.Tensor, float] | None] | None = None
        self.steer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
        self.step: Callable | None = None
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"name: got {name}, which another layer has already")
        layers[name] = self

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take what vLLM has allocated: [blocks, 1, 1, numbers] of the model's dtype."""
        rule = self.rule
        self.kv_cache = kv_cache
        states = kv_cache.select(1, 0).select(1, 0).view(torch.float32)
        self.cache = states.unflatten(1, (rule.heads, rule.rank, rule.rank))
        kind = getattr(operations("auto", self.cache.device), "BlockStep", None)
        self.step = None if kind is None else kind(self.cache, rule, self.corrections)

    def advance(
        self, projections: torch.Tensor, gate_bias: torch.Tensor, reads: torch.Tensor, plan: Plan | None
    ) -> None:
        """``advance_blocks`` of this layer; without a plan all tokens read 0."""
        if plan is None:
            reads.zero_()
            return
        operators, table = operations("auto", projections.device), self.requests.table
        table = None if table is None else table[self.place]
        advance_blocks(operators, projections, gate_bias, self.cache, self.rule, plan, table, reads)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StatesBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> StateSpec:
        block, dtype = vllm_config.cache_config.block_size, vllm_config.model_config.dtype
        size = 4 * self.rule.heads * self.rule.rank**2
        # In the keys' dtype, of which a state is so many numbers: vLLM zeroes every new block of a cache of mixed ones.
        return StateSpec(
            block_size=block, num_kv_heads=1, head_size=size // dtype.itemsize, head_size_v=0, dtype=dtype,
            state_content_bytes=size, tokens_per_state=block,
        )  # fmt: skip


class StatesBackend(AttentionBackend):
    """The name under which vLLM finds the builder."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "DELTA_MEM_STATES"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[StatesBuilder]:
        return StatesBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        # A block that is split has no place for its state.
        return [MultipleOf(1)] if kv_cache_spec is None else [kv_cache_spec.block_size]


class StatesBuilder(AttentionMetadataBuilder[Plan]):
    """Makes the plan of a step, once for all layers."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block = kv_cache_spec.block_size
        if self.block != kv_cache_spec.tokens_per_state:
            raise UnsupportedError(
                f"block_size: the attention's kernels split blocks of {kv_cache_spec.tokens_per_state} tokens into "
                f"blocks of {self.block}, allowed with a delta-mem adapter: one that they take whole"
            )
        layers = vllm_config.compilation_config.static_forward_context
        self.requests: Requests = layers[layer_names[0]].requests

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Plan:
        found = common_attn_metadata
        bounds = found.query_start_loc_cpu.numpy()
        # Exact: it is above only where drafts were turned down, and there are none.
        starts = found.seq_lens_cpu_upper_bound.numpy()[: len(bounds) - 1] - (bounds[1:] - bounds[:-1])
        table = found.block_table_tensor
        if not self.requests.rows:
            return make_plan(starts, bounds, table, self.block)
        uses, slots, firsts = np.full(len(starts), WRITES), np.full(len(starts), -1), np.zeros(len(starts), np.int64)
        for row, request in self.requests.rows.items():
            if row >= len(starts) or bounds[row + 1] == bounds[row]:
                continue
            uses[row], slots[row], firsts[row] = _USES[request.given.mode], request.slot, request.given.first
            if request.given.key is not None:
                request.tokens = int(starts[row] + bounds[row + 1] - bounds[row])
                # A copy, which nobody waits for here: the table changes with the batch.
                request.block = table[row, (request.tokens - 1) // self.block].clone()
        return make_plan(starts, bounds, table, self.block, uses=uses, slots=slots, firsts=firsts)


def _layer_and_plan(layer_name: str) -> tuple[States, Plan | None]:
    """A layer's states and this step's plan; None in a run that measures memory."""
    context = get_forward_context()
    plans = context.attn_metadata
    return context.no_compile_layers[layer_name], plans.get(layer_name) if isinstance(plans, dict) else None


def _advance(projections: torch.Tensor, gate_bias: torch.Tensor, reads: torch.Tensor, layer_name: str) -> None:
    """Write the reads [T, H·r] of projections [T, W] into ``reads``; the states of this step's sequences move on."""
    layer, plan = _layer_and_plan(layer_name)
    layer.advance(projections, gate_bias, reads, plan)


def _advance_and_steer(
    projections: torch.Tensor, gate_bias: torch.Tensor, rows: torch.Tensor, delta: torch.Tensor, layer_name: str
) -> None:
    """The states move on, Δq, Δk and Δv are added to rows [T, q | k | v], and Δo is written to ``delta`` [T, out]."""
    layer, plan = _layer_and_plan(layer_name)
    done, reads = False, None
    if plan is not None:
        done, reads = step_blocks(layer.step, projections, gate_bias, plan, rows, delta)
    if not done:
        reads = torch.empty(len(projections), layer.rule.read_width, dtype=torch.float32, device=projections.device)
        layer.advance(projections, gate_bias, reads, plan)
    if reads is not None:
        layer.steer(rows, delta, reads)


def _nothing(*_) -> None:
    return None


OPERATORS = {
    "deltamem_advance": (_advance, ["reads"]),
    "deltamem_advance_and_steer": (_advance_and_steer, ["rows", "delta"]),
}
for _name, (_function, _written) in OPERATORS.items():
    if not hasattr(torch.ops.vllm, _name):
        direct_register_custom_op(_name, _function, mutates_args=_written, fake_impl=_nothing)
