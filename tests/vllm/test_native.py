"""vLLM's own models with a memory generate what transformers does, token for token, whatever vLLM does in between."""

import pytest

from tests.vllm.engines import BLOCK, Expected, counted, engine, generate, prompts, rounds

TOKENS = 24


@pytest.fixture(scope="module")
def expected(qwen3):
    return Expected(qwen3)


def check_rounds(llm, expected, seed: int) -> None:
    for batch in rounds(seed):
        assert generate(llm, batch, TOKENS) == [expected(ids, TOKENS) for ids in batch]


def test_greedy_is_transformers(qwen3, expected):
    batch = prompts(5, seed=1)
    wanted = [expected(ids, 40) for ids in batch]
    bare = Expected(qwen3, bare=True)
    assert wanted != [bare(ids, 40) for ids in batch]  # the adapter is heard
    with engine(qwen3) as llm:
        assert generate(llm, batch, 40) == wanted
        check_rounds(llm, expected, seed=10)
        assert counted(llm, "prefix_cache_hits") >= 4 * 2 * BLOCK


def test_one_prefix_in_one_step(qwen3, expected):
    """Requests that come together and share whole blocks: the later ones wait for the first's states."""
    batch = prompts(4, seed=20, shortest=4, longest=12, shared=3 * BLOCK)
    with engine(qwen3, max_num_batched_tokens=1024) as llm:
        assert generate(llm, batch, TOKENS) == [expected(ids, TOKENS) for ids in batch]
        assert counted(llm, "prefix_cache_hits") == 3 * 3 * BLOCK


def test_chunked_prefill(qwen3, expected):
    with engine(qwen3, max_num_batched_tokens=37) as llm:
        check_rounds(llm, expected, seed=30)


def test_preemption(qwen3, expected):
    with engine(qwen3, num_gpu_blocks_override=9, max_model_len=256) as llm:
        for seed in (40, 41):
            batch = prompts(6, seed=seed, shortest=20, longest=60)
            assert generate(llm, batch, 60) == [expected(ids, 60) for ids in batch]
        assert counted(llm, "num_preemptions") > 0


def test_without_prefix_cache(qwen3, expected):
    with engine(qwen3, enable_prefix_caching=False, max_num_batched_tokens=64) as llm:
        check_rounds(llm, expected, seed=50)


def test_compiled(qwen3, expected):
    with engine(qwen3, enforce_eager=False, max_num_batched_tokens=128) as llm:
        check_rounds(llm, expected, seed=60)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_as_a_gpu_corrects(qwen3, expected, monkeypatch, eager):
    """Reads leave the operator, and q and o are corrected in the compiled graph."""
    from deltamem_fast.vllm import linears

    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    monkeypatch.setattr(linears, "at_once", lambda device: False)
    with engine(qwen3, enforce_eager=eager, max_num_batched_tokens=128) as llm:
        check_rounds(llm, expected, seed=70)
