"""Requests that bring a memory along: what is read, what is written, whose prefixes are whose."""

import numpy as np
import pytest
import torch

from deltamem_fast import MemoryBank, MemoryState
from deltamem_fast.errors import ArgumentError
from tests.support import relative_error
from tests.vllm.engines import BLOCK, Expected, counted, engine, prompts
from tests.vllm.engines import generate as plain
from tests.vllm.run_engine import run

TOKENS = 24


@pytest.fixture(scope="module")
def expected(qwen3):
    return Expected(qwen3)


@pytest.fixture(scope="module")
def told(expected):
    """Memories of three users who have said something."""
    rows = []
    for ids in prompts(3, seed=100, shortest=20, longest=40):
        memory = MemoryState.zeros(expected.model)
        with torch.no_grad():
            expected.model(torch.tensor([ids]), memory=memory)
        rows.append(memory)
    return MemoryState.cat(rows)


def sampling(count: int = TOKENS, **more):
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, **more)


def tokens_of(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def after(expected, prompt, memory):
    """What follows a prompt, and the memory then; the last token is not written."""
    memory = memory.clone()
    return expected(prompt, TOKENS, memory), memory


def close(memory, wanted) -> bool:
    return max(relative_error(memory[i], wanted[i]) for i in wanted) < 1e-4


SETTINGS = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 40},
    "preempted": {"num_gpu_blocks_override": 9, "max_model_len": 256},
    "compiled": {"enforce_eager": False, "max_num_batched_tokens": 128},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_write_read_none(qwen3, expected, told, setting):
    """Users' own memories, beside requests that bring none, one prefix for all; over several turns."""
    from deltamem_fast.vllm.offline import generate, memory_model

    bare = Expected(qwen3, bare=True)
    with engine(qwen3, **SETTINGS[setting]) as llm:
        memory = MemoryState.zeros(memory_model(llm), batch_size=3)
        assert list(memory) == list(told)
        for layer in told:
            memory.put(layer, told[layer], in_place=True)
        for turn in range(3):
            batch = prompts(3, seed=110 + turn, shortest=5, longest=60, shared=BLOCK + 3)
            wanted = [after(expected, ids, memory.select([row])) for row, ids in enumerate(batch)]
            before = memory.clone()
            frozen = memory.read_only() if turn % 2 else memory
            outputs = generate(llm, batch, sampling(), memory=frozen, mode="read")
            read = [expected(ids, TOKENS, memory.select([row]).read_only()) for row, ids in enumerate(batch)]
            assert tokens_of(outputs) == read
            assert all(torch.equal(memory[i], before[i]) for i in memory)
            assert tokens_of(generate(llm, batch, sampling(), memory=memory)) == [ids for ids, _ in wanted]
            assert close(memory, MemoryState.cat([memory for _, memory in wanted]))
            assert plain(llm, batch, TOKENS) == [expected(ids, TOKENS) for ids in batch]
            assert tokens_of(generate(llm, batch, sampling(), mode="none")) == [bare(ids, TOKENS) for ids in batch]
        if setting == "preempted":
            assert counted(llm, "num_preemptions") > 0


def test_a_guarded_engine_and_requests_that_are_trusted_by_half(qwen3, expected, told):
    """What is written is what a guarded model of transformers writes, and the memory goes half the way there."""
    from deltamem_fast.vllm.offline import generate, memory_model

    guarded = Expected(qwen3, guard=True)
    given = {"delta_mem_adapter": str(qwen3 / "adapter"), "delta_mem_guard": True}
    with engine(qwen3, hf_overrides=given | {"architectures": ["DeltaMemQwen3ForCausalLM"]}) as llm:
        memory = MemoryState.zeros(memory_model(llm), batch_size=3)
        for layer in told:
            memory.put(layer, told[layer], in_place=True)
        batch = prompts(3, seed=130, shortest=5, longest=60)
        wanted = [after(guarded, ids, told.select([row])) for row, ids in enumerate(batch)]
        with pytest.raises(ArgumentError, match="trust: got 2"):
            generate(llm, batch, sampling(), memory=memory, trust=2)
        assert tokens_of(generate(llm, batch, sampling(), memory=memory, trust=0.5)) == [ids for ids, _ in wanted]
    whole = MemoryState.cat([memory for _, memory in wanted])
    free = MemoryState.cat([after(expected, ids, told.select([row]))[1] for row, ids in enumerate(batch)])
    assert all(relative_error(memory[i], torch.lerp(told[i], whole[i], 0.5)) < 1e-4 for i in told)
    assert max(relative_error(whole[i], free[i]) for i in told) > 1e-3  # the guard is felt


def test_all_modes_in_one_batch(qwen3, expected, told):
    from deltamem_fast.vllm.given import arguments_of, salt_of

    bare = Expected(qwen3, bare=True)
    batch = prompts(8, seed=120, shortest=3, longest=50, shared=BLOCK)
    states = torch.stack([told[layer] for layer in told], 1).numpy()
    kinds = ["write", "none", "read", None, "write", "read", "none", None]
    found = [
        {} if kind is None else arguments_of(None if kind == "none" else states[place % 3], kind)
        for place, kind in enumerate(kinds)
    ]
    wanted = []
    for place, (ids, kind) in enumerate(zip(batch, kinds)):
        row = told.select([place % 3])
        if kind == "none":
            wanted.append(bare(ids, TOKENS))
        else:
            wanted.append(expected(ids, TOKENS, {"write": row, "read": row.read_only(), None: None}[kind]))
    with engine(qwen3, max_num_batched_tokens=70) as llm:
        for _ in range(3):
            requests = [
                {"prompt_token_ids": ids} | ({"cache_salt": salt} if (salt := salt_of(each)) else {})
                for ids, each in zip(batch, found)
            ]
            outputs = llm.generate(requests, [sampling(extra_args=each) for each in found], use_tqdm=False)
            assert tokens_of(outputs) == wanted


def test_the_bare_model_bit_for_bit(qwen3):
    from deltamem_fast.vllm.offline import generate

    batch = prompts(4, seed=130)
    params = sampling(logprobs=5)
    found = []
    for architecture in ("", "DeltaMemQwen3ForCausalLM"):
        with engine(qwen3, architecture) as llm:
            if architecture:
                outputs = generate(llm, batch, params, mode="none")
            else:
                outputs = llm.generate([{"prompt_token_ids": ids} for ids in batch], params, use_tqdm=False)
            found.append([
                [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
                for output in outputs
            ])  # fmt: skip
    assert found[0] == found[1]


def test_a_bank_is_the_same_in_both(qwen3, expected, told, tmp_path):
    """A bank made with transformers, gathered, generated from and committed with vLLM, and gathered again there."""
    from deltamem_fast.vllm.offline import generate, memory_model

    names, batch = ["ada", "ben", "cem"], prompts(3, seed=140)
    with MemoryBank(tmp_path / "users.bank", expected.model) as bank:
        bank.commit(names, told)
    with engine(qwen3) as llm, MemoryBank(tmp_path / "users.bank", memory_model(llm)) as bank:
        memory = bank.gather(names)
        assert all(torch.equal(memory[i], told[i]) for i in told)
        wanted = [after(expected, ids, told.select([row])) for row, ids in enumerate(batch)]
        assert tokens_of(generate(llm, batch, sampling(), memory=memory)) == [ids for ids, _ in wanted]
        bank.commit(names, memory)
    with MemoryBank(tmp_path / "users.bank", expected.model) as bank:
        assert close(bank.gather(names), MemoryState.cat([memory for _, memory in wanted]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_of_their_own(qwen3, expected, told, tmp_path, ranks, monkeypatch):
    """The engine's core in one process, its workers in others: memories cross over, and come back."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if ranks == 2 else "nobind")
    file = tmp_path / "told.safetensors"
    told.save(file)
    batches, memory, wanted = [prompts(3, seed=170 + turn, shared=BLOCK) for turn in range(2)], told.clone(), []
    for batch in batches:
        turns = [after(expected, ids, memory.select([row])) for row, ids in enumerate(batch)]
        wanted.append([ids for ids, _ in turns])
        memory = MemoryState.cat([row for _, row in turns])
    settings = {"tensor_parallel_size": ranks, "max_num_batched_tokens": 90}
    assert run("run_memories", [str(qwen3), settings, batches, TOKENS, str(file)]) == wanted
    assert close(MemoryState.load(file, expected.model), memory)


def test_a_wrong_salt_poisons_nobody(qwen3, expected, told):
    """Without its salt, a request's blocks are kept from others, who ask for the same tokens."""
    from deltamem_fast.vllm.given import arguments_of

    states = torch.stack([told[layer] for layer in told], 1).numpy()
    ids = prompts(1, seed=150, shortest=80, longest=90)[0]
    with engine(qwen3) as llm:
        for salt in ({}, {"cache_salt": "another"}):
            params = sampling(extra_args=arguments_of(states[0]))
            llm.generate([{"prompt_token_ids": ids, **salt}], params, use_tqdm=False)
            assert plain(llm, [ids], TOKENS) == [expected(ids, TOKENS)]
            shared = llm.generate([{"prompt_token_ids": ids, **salt}], sampling(), use_tqdm=False)
            assert tokens_of(shared) == [expected(ids, TOKENS)]


def test_mistakes_are_refused_and_the_engine_lives(qwen3, expected, told):
    from vllm import SamplingParams

    from deltamem_fast.vllm.given import MODE, STATE, arguments_of
    from deltamem_fast.vllm.offline import generate, memory_model

    ids = prompts(1, seed=160)[0]
    with engine(qwen3) as llm:
        memory = MemoryState.zeros(memory_model(llm))
        for wrong, words in (
            ({MODE: "append"}, "delta_mem_mode: got 'append', allowed write, read, none"),
            ({STATE: "???"}, "delta_mem_state: got what is no base64"),
            ({STATE: 3}, "delta_mem_state: got 3, allowed a string"),
            (arguments_of(np.zeros((1, 1, 8, 8), np.float32)), r"got 256 bytes, allowed 768 \(3 × 1 × 8 × 8"),
        ):
            with pytest.raises(Exception, match=words):
                llm.generate([{"prompt_token_ids": ids}], sampling(extra_args=wrong), use_tqdm=False)
        with pytest.raises(ArgumentError, match="memory: got 1 rows for 2 prompts"):
            generate(llm, [ids, ids], sampling(), memory=memory)
        with pytest.raises(ArgumentError, match="n: got 2, allowed 1"):
            generate(llm, [ids], SamplingParams(n=2), memory=memory)
        with pytest.raises(ArgumentError, match="stop: got"):
            generate(llm, [ids], SamplingParams(stop=["."]), memory=memory)
        with pytest.raises(ArgumentError, match="frozen"):
            generate(llm, [ids], sampling(), memory=memory.read_only(), mode="write")
        with pytest.raises(ArgumentError, match="mode: got 'append', allowed write, read, none"):
            generate(llm, [ids], sampling(), memory=memory, mode="append")
        assert plain(llm, [ids], TOKENS) == [expected(ids, TOKENS)]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_bfloat16(qwen3, eager):
    """States stay float32 in a cache of another dtype; what is in them is transformers' within bfloat16's rounding."""
    from transformers import AutoModelForCausalLM

    from deltamem_fast import patch_model
    from deltamem_fast.vllm.offline import generate, memory_model

    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.bfloat16).eval()
    patch_model(model, str(qwen3 / "adapter"))
    batch = prompts(4, seed=190, shortest=20, longest=70)
    wanted = MemoryState.zeros(model, batch_size=4)
    for row, ids in enumerate(batch):
        memory = MemoryState.zeros(model)
        with torch.no_grad():
            model(torch.tensor([ids]), memory=memory)
        for layer in wanted:
            wanted[layer][row] = memory[layer][0]
    with engine(qwen3, dtype="bfloat16", max_num_batched_tokens=50, enforce_eager=eager) as llm:
        found = MemoryState.zeros(memory_model(llm), batch_size=4)
        generate(llm, batch, sampling(1), memory=found)
        assert max(relative_error(found[i], wanted[i]) for i in wanted) < 0.05
        spec = llm.collective_rpc(_specs)[0]
        assert spec == {"state": 256, "keys": 2 * 2 * 32 * 2 * BLOCK, "zeroed": False}


def _specs(worker) -> dict:
    config = worker.model_runner.kv_cache_config
    [group] = config.kv_cache_groups
    specs = group.kv_cache_spec.kv_cache_specs
    sizes = {"state" if "delta_memory" in name else "keys": spec.page_size_bytes for name, spec in specs.items()}
    return sizes | {"zeroed": config.needs_kv_cache_zeroing}
