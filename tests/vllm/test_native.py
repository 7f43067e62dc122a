"""vLLM's own Qwen3 with a memory generates what transformers does, token for token."""

from tests.vllm.engines import Expected, engine, generate, prompts


def test_greedy_is_transformers(qwen3):
    batch = prompts(5, seed=1)
    expected, bare = Expected(qwen3), Expected(qwen3, bare=True)
    wanted = [expected(ids, 40) for ids in batch]
    assert wanted != [bare(ids, 40) for ids in batch]  # the adapter is heard
    with engine(qwen3) as llm:
        assert generate(llm, batch, 40) == wanted
