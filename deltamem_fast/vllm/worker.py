"""What a worker can be asked by ``collective_rpc``."""

from __future__ import annotations

from .requests import Requests


class MemoryWorker:
    """A part of vLLM's worker (``worker_extension_cls``)."""

    def delta_mem_take(self, keys: list[str]) -> list[tuple[int, bytes] | None]:
        """The last states of requests that were given these keys, each once.

        Returns:
            of each (tokens written, float32 [L, H, r, r] as little-endian bytes); None: there is none of that key.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        requests: Requests = next(layer.requests for layer in layers.values() if hasattr(layer, "requests"))
        return [requests.take(key) for key in keys]
