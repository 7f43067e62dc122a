"""Engines of vLLM in this process, small and offline; before vLLM is imported."""

import os

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    """A tiny Qwen3 with an adapter."""
    from tests.vllm.engines import checkpoint

    return checkpoint(tmp_path_factory.mktemp("qwen3"))
