"""Two processes, each with a part of every weight, are one: tensor parallelism of transformers and of torch."""

import datetime
import functools
import importlib.util
import multiprocessing
import os
import socket
import traceback

import pytest
import torch
import torch.multiprocessing
from backbones import QWEN_EXPERTS, tiny
from byte_tokenizer import build_tokenizer
from support import loud_adapter, relative_error

from deltamem_fast import (
    DeltaMemConfig,
    MemorySession,
    MemoryState,
    layer_paths,
    memory_state,
    patch_model,
    save_adapter,
    unpatch_model,
)
from deltamem_fast.adapter.files import read_weights
from deltamem_fast.errors import UnsupportedError
from deltamem_fast.training.setup import prepare_for_training

pytestmark = pytest.mark.xdist_group("distributed")  # one worker starts processes, one after another
WORLD = 2
STARTED = [f"delta_{head}_proj" for head in "qkvo"]
# heads: 4 of q, 2 of k and v; each process has half of them. Phi's q, k and v are gathered; its o is not.
MODELS = {
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", QWEN_EXPERTS),
    "phi3": ("Phi3ForCausalLM", {}),
    "llama, by torch": ("LlamaForCausalLM", {"attention_bias": True}),
    "talks": ("Qwen3ForCausalLM", {"vocab_size": 260, "eos_token_id": 258}),
}
CONFIGS = {
    "all heads": DeltaMemConfig(
        delta_heads=("q", "k", "v", "o"), trainable_delta_scale=True, delta_scale_granularity="head",
        delta_o_rmsnorm=True,
    ),
    "ssw": DeltaMemConfig.ssw(),
    "msw": DeltaMemConfig.msw(heads=2, rank=3),
}  # fmt: skip
CASES = [("qwen3", config) for config in CONFIGS] + [
    (name, "all heads") for name in MODELS if name not in ("qwen3", "talks")
]
IDS = torch.randint(3, 100, (2, 14), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def spread(path, name):
    """The model of this process, with its part of the weights."""
    kind = type(tiny(*MODELS[name][:1], **MODELS[name][1]))
    if "torch" not in name:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_size=WORLD, tp_plan="auto")
        return kind.from_pretrained(path / name, dtype=torch.float32, distributed_config=config).eval()
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = kind.from_pretrained(path / name, dtype=torch.float32).eval()
    mesh = torch.distributed.init_device_mesh("cpu", (WORLD,))
    plan = {f"self_attn.{head}_proj": ColwiseParallel() for head in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def results(model, adapter):
    """What a patched model says, remembers and learns; and what it is without its memory."""
    with torch.no_grad():
        bare = model(input_ids=IDS, attention_mask=MASK).logits
        patch_model(model, adapter, backend="reference")
        out = model(input_ids=IDS[:, :11], attention_mask=MASK[:, :11], use_cache=True)
        parts = [out.logits * MASK[:, :11, None]]
        for t in range(11, 14):
            given = {"attention_mask": MASK[:, : t + 1], "past_key_values": out.past_key_values}
            out = model(input_ids=IDS[:, t : t + 1], **given)
            parts.append(out.logits)
        memory = MemoryState.zeros(model, 2)
        given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "memory": memory}
        tokens = model.generate(input_ids=IDS, attention_mask=MASK, **given)
    found = {"logits": torch.cat(parts, 1), "tokens": tokens}
    found |= {f"state {i}": state.clone() for i, state in memory_state(out.past_key_values).items()}
    found |= {f"generated {i}": state.clone() for i, state in memory.items()}
    paths = {f"{place.path}: {place.reason}" for place in layer_paths(model).values()}
    prepare_for_training(model)
    logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    (logits.float().square() * MASK[..., None]).sum().backward()
    found |= {
        f"gradient {name}": p.grad
        for name, p in model.named_parameters()
        if ".delta_memory." in name and p.requires_grad
    }
    unpatch_model(model)
    model.eval()
    with torch.no_grad():
        after = model(input_ids=IDS, attention_mask=MASK).logits
    return found, paths, torch.equal(after, bare), sorted(model.state_dict())


def converse(model, adapter):
    """What a session says and remembers: facts, a turn whose context then goes, a turn after it."""
    session = MemorySession(patch_model(model, adapter, backend="reference"), build_tokenizer(), context_turns=1)
    session.ingest("The key lies under the third stone.")
    said = [session.answer(text, max_new_tokens=8, do_sample=False) for text in ("Where is it?", "And the door?")]
    session.forget("The key lies under the third stone.")
    return said, {i: state.clone() for i, state in session.memory.items()}


def fresh(path):
    """A model patched in each process by itself, which draws other numbers there; then saved in two ways."""
    model = spread(path, "qwen3")
    torch.manual_seed(100 + torch.distributed.get_rank())
    patch_model(model, CONFIGS["all heads"], backend="reference")
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if ".delta_memory." in n}
    model.save_pretrained(path / "saved beside")  # every process has to; one writes
    memory = MemoryState.zeros(model)
    with torch.no_grad():
        model(input_ids=IDS[1:], memory=memory, use_cache=False)
    if torch.distributed.get_rank() == 0:  # these need no other process
        save_adapter(model, path / "saved alone")
        memory.save(path / "memory.safetensors")
    return adapter


def two_dimensions(path):
    """Weights over a mesh of two dimensions: nothing says which rows of a sum a process computes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = tiny("Qwen3ForCausalLM")
    mesh = torch.distributed.init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "tp"))
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.data, mesh, [Replicate(), Shard(0)]))
    patch_model(model)


def _outcome(function, *args):
    try:
        return function(*args)
    except UnsupportedError as error:
        return str(error)
    except Exception:  # both processes fail alike, or the other one waits in vain
        return "failed: " + traceback.format_exc()


def worker(rank, port, path):
    """All cases one after another, so that the processes start once."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD)}
    limit = datetime.timedelta(minutes=3)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=limit)
    try:
        found = {case: _outcome(lambda n, c: results(spread(path, n), path / f"{n} {c}"), *case) for case in CASES}
        found["session"] = _outcome(lambda: converse(spread(path, "talks"), path / "qwen3 msw"))
        found["fresh"] = _outcome(fresh, path)
        found["two dimensions"] = _outcome(two_dimensions, path)
        torch.save(found, path / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@functools.cache
def one_process(path, name, config):
    kind, changes = MODELS[name]
    return results(tiny(kind, **changes), path / f"{name} {config}")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, and the directory."""
    if importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        pytest.skip("this transformers leaves plain tensors, which are refused")
    path = tmp_path_factory.mktemp("tensor_parallel")
    for name, (kind, changes) in MODELS.items():
        tiny(kind, **changes).save_pretrained(path / name)
    for name, config in CASES:
        model = tiny(MODELS[name][0], **MODELS[name][1])
        save_adapter(loud_adapter(patch_model(model, CONFIGS[config])), path / f"{name} {config}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["transformers.models.qwen3.modeling_qwen3", "deltamem_fast.training.setup"])
    torch.multiprocessing.start_processes(worker, (port, path), nprocs=WORLD, start_method="forkserver")
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)], path


@pytest.mark.parametrize("name, config", CASES, ids=["-".join(case) for case in CASES])
def test_two_processes_are_one(name, config, found):
    processes, path = found
    expected, _, _, keys = one_process(path, name, config)
    ours, others = (process[name, config] for process in processes)
    for outcome in (ours, others):
        assert not isinstance(outcome, str), outcome
    first = "qkv_proj" if name == "phi3" else "q_proj"
    assert ours[1] == others[1] == {f"generic: {first} is spread over processes"}
    assert ours[2:] == others[2:] == (True, keys)  # unpatched: the same bits, the same keys
    assert ours[0].keys() == expected.keys()
    for key, value in expected.items():
        # States are the same bits in all processes: nothing would ever bring them together again.
        assert torch.equal(ours[0][key], others[0][key]), key
        if key == "tokens":
            assert torch.equal(ours[0][key], value)
            continue
        assert value.norm() > 0 and relative_error(ours[0][key], value) < (1e-4 if "gradient" in key else 1e-5), key


def test_a_session_is_the_same(found):
    processes, path = found
    kind, changes = MODELS["talks"]
    said, memory = converse(tiny(kind, **changes), path / "qwen3 msw")
    for process in processes:
        assert not isinstance(process["session"], str), process["session"]
        assert process["session"][0] == said and all(said)
        assert all(relative_error(process["session"][1][i], memory[i]) < 1e-5 for i in memory)
        assert all(torch.equal(process["session"][1][i], processes[0]["session"][1][i]) for i in memory)


def test_a_fresh_adapter_is_the_same_in_all_processes(found):
    processes, path = found
    ours, others = (process["fresh"] for process in processes)
    for outcome in (ours, others):
        assert not isinstance(outcome, str), outcome
    alone = patch_model(tiny("Qwen3ForCausalLM"), CONFIGS["all heads"], backend="reference")
    for name, value in alone.named_parameters():
        if ".delta_memory." in name:
            assert torch.equal(ours[name], others[name]), name
            if name.split(".")[-1] in STARTED:  # those that start from the backbone's rows, which each has a part of
                assert value.norm() > 0 and torch.equal(ours[name], value)
    for directory in ("saved beside", "saved alone"):
        saved = read_weights(path / directory)
        assert len(saved) == len(ours)
        assert all(torch.equal(saved[name.replace(".delta_memory.", ".")], value) for name, value in ours.items())


def test_a_memory_goes_from_several_processes_to_one(found):
    _, path = found
    alone = patch_model(tiny("Qwen3ForCausalLM"), path / "saved alone", backend="reference")
    memory, loaded = MemoryState.zeros(alone), MemoryState.load(path / "memory.safetensors", alone)
    with torch.no_grad():
        alone(input_ids=IDS[1:], memory=memory, use_cache=False)
        alone(input_ids=IDS[:1], memory=loaded.clone(), use_cache=False)  # which checks that it is the same adapter
    assert all(relative_error(loaded[i], memory[i]) < 1e-5 for i in memory)


def test_what_cannot_be_told_is_refused(found):
    for process in found[0]:
        message = process["two dimensions"]
        assert "q_proj is spread as" in message and "mesh of 2 dimension(s)" in message and "not supported" in message


def test_plain_parts_of_older_versions_are_refused():
    model = tiny("Qwen3ForCausalLM")
    model._tp_size = 2
    with pytest.raises(UnsupportedError, match=r"model: sharded by tensor parallelism into plain tensors"):
        patch_model(model)
