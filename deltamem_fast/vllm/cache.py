"""How vLLM keeps the states: one a block in each layer, in the cache group of the keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .given import salt_of


@dataclass(frozen=True, kw_only=True)
class StateSpec(FullAttentionSpec):
    """One layer's states: a block has one, whatever its tokens are."""


class StateManager(FullAttentionManager):
    """Full attention's, but that no request takes blocks that another one is computing in the same step.

    Keys and values of all requests of a step are written before any is read; a state is read before others are
    written. vLLM asks the manager of a group's first layer, which therefore is one of ours.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._computed_now: set = set()

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._computed_now.clear()

    def get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, *args, **kwargs) -> int:
        """More than there are, for a request that is to wait for the next step."""
        if new_computed_blocks and new_computed_blocks[-1].block_hash in self._computed_now:
            return self.block_pool.num_gpu_blocks + 1
        return super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)

    def cache_blocks(self, request, *args, **kwargs) -> None:
        """Nothing, for a request whose salt does not name the memory that it started from: it keeps them for itself."""
        params = request.sampling_params
        salt = None if params is None else salt_of(params.extra_args)
        if salt is not None and request.cache_salt != salt:
            return
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, *args, **kwargs)
        after = self.num_cached_block.get(request.request_id, 0)
        for block in self.req_to_blocks[request.request_id][before:after]:
            if block.block_hash is not None:
                self._computed_now.add(block.block_hash)


def register_spec() -> None:
    """Make ``StateSpec`` known, after vLLM's own: its registry fills itself only while it is empty."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # which fills it
    KVCacheSpecRegistry.register(StateSpec, StateManager, uniform_type_base_spec=FullAttentionSpec)
