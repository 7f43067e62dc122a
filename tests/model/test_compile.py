"""torch.compile of a patched model: one graph, no recompilation per token, the memory right."""

import copy

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from deltamem_fast import (
    DeltaMemConfig,
    MemoryState,
    is_patched,
    layer_paths,
    memory_disabled,
    memory_state,
    patch_model,
    record_gates,
    unpatch_model,
)
from deltamem_fast.training.setup import prepare_for_training

IDS = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(7))
BACKENDS = ("reference", "numba")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def patched(backend, layers=1):
    """A patched model; tracing takes the time of its layers, and two are two of the same."""
    return loud_adapter(patch_model(tiny_model(num_hidden_layers=layers), backend=backend))


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_with_a_static_cache(backend, compiler):
    if (backend, compiler) == ("reference", "inductor"):
        pytest.skip("the reference is not meant to be fast; aot_eager shows that it traces")
    model = patched(backend, layers=2)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    ours, theirs = StaticCache(config=model.config, max_cache_len=20), DynamicCache(config=model.config)
    model(IDS[:, :6], past_key_values=ours)
    model(IDS[:, :6], past_key_values=theirs)
    address = memory_state(ours)[0].data_ptr()
    for t in range(6, 14):
        out = compiled(IDS[:, t : t + 1], past_key_values=ours).logits
        assert relative_error(out, model(IDS[:, t : t + 1], past_key_values=theirs).logits) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert all(relative_error(memory_state(ours)[i], memory_state(theirs)[i]) < 1e-5 for i in (0, 1))
    assert memory_state(ours)[0].data_ptr() == address


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.soak), "numba"])
def test_prefill_and_a_callers_memory(backend):
    model = patched(backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = MemoryState.zeros(model, 2), MemoryState.zeros(model, 2)
    mask = torch.ones_like(IDS[:, :5])
    mask[0, :2] = 0
    for ids, real in ((IDS[:, :5], mask), (IDS[:, 5:10], None)):
        out = compiled(ids, attention_mask=real, memory=ours, use_cache=False).logits
        expected = model(ids, attention_mask=real, memory=theirs, use_cache=False).logits
        assert relative_error(out[:, 2:], expected[:, 2:]) < 1e-5
    assert all(relative_error(ours[i], theirs[i]) < 1e-5 for i in theirs)
    out, expected = compiled(IDS[:, :6]), model(IDS[:, :6])
    assert relative_error(out.logits, expected.logits) < 1e-5
    assert relative_error(memory_state(out.past_key_values)[0], memory_state(expected.past_key_values)[0]) < 1e-5


def test_gradients():
    with torch.enable_grad():
        grads = []
        for compile in (False, True):
            model = patched("numba")
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compile else model
            run(IDS[:, :6], labels=IDS[:, :6], use_cache=False).loss.backward()
            grads.append([p.grad for n, p in model.named_parameters() if ".delta_memory." in n and p.requires_grad])
    assert all(relative_error(ours, theirs) < 1e-5 for theirs, ours in zip(*grads))


@pytest.mark.parametrize("kind", ("none", pytest.param("non-reentrant", marks=pytest.mark.soak)))
def test_a_training_step(kind):
    """A write pass, a read pass from what it wrote, and the gates' penalty, each pass compiled."""
    with torch.enable_grad():
        found = []
        for compile in (False, True):
            model = prepare_for_training(patched("numba"))
            if kind == "non-reentrant":
                model.gradient_checkpointing_enable({"use_reentrant": False})
            run = torch.compile(model, fullgraph=kind == "none", backend="aot_eager") if compile else model
            for _ in range(2):
                memory = MemoryState.zeros(model, 2)
                with record_gates() as gates:
                    run(IDS[:, :5], memory=memory, use_cache=False, logits_to_keep=1)
                memory.frozen = True
                loss = run(IDS[:, 5:9], memory=memory, labels=IDS[:, 5:9], use_cache=False).loss
                (loss + 3 * gates.penalty(0.3)).backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
            if compile and kind == "none":
                assert counters["stats"]["unique_graphs"] == 2
    assert all(theirs.norm() > 0 and relative_error(ours, theirs) < 1e-4 for theirs, ours in zip(*found))


def test_memory_disabled_in_a_compiled_region():
    model = patched("numba")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = compiled(IDS[:, :5], use_cache=False).logits
    with memory_disabled(model):
        assert relative_error(compiled(IDS[:, :5], use_cache=False).logits, tiny_logits(model)) < 1e-6
    assert torch.equal(compiled(IDS[:, :5], use_cache=False).logits, first)


def tiny_logits(model, length=5):
    return model(IDS[:, :length], use_cache=False).logits


def test_ops_pass_torchs_own_checks():
    from deltamem_kernels.numba import recurrence
    from deltamem_kernels.schemas import flat_rule

    rule = DeltaMemConfig.msw(heads=2, rank=3).rule
    tokens = torch.randn(2, 4, rule.width, requires_grad=True)
    bias, state = torch.randn(rule.bias_width, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
    flags = flat_rule(rule)
    with torch.enable_grad():
        torch.library.opcheck(recurrence.scan_op, (tokens, bias, state, None, None, None, *flags, 2))
    plain = [t.detach() for t in (tokens, bias, state)]
    skipped = torch.zeros(2, dtype=torch.int32)
    torch.library.opcheck(recurrence.step_op, (plain[0][:, 0], plain[1], plain[2], skipped, None, None, *flags))
    torch.library.opcheck(recurrence.read_op, (plain[0], plain[2], None, None, *flags))


def test_generate_compiles_its_decode():
    """What generate does by itself on a GPU: one graph for all decoded tokens, the memory as without a compiler."""
    from transformers import CompileConfig

    model = patched("numba")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [9]}
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    ours, theirs = MemoryState.zeros(model, 2), MemoryState.zeros(model, 2)
    expected = model.generate(IDS, attention_mask=mask, memory=theirs, **settings)
    compiling = CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    compiling._compile_all_devices = True
    address = ours[0].data_ptr()
    out = model.generate(
        IDS, attention_mask=mask, memory=ours, cache_implementation="static", compile_config=compiling, **settings
    )
    assert torch.equal(out, expected)
    # The first decoded token has no ended rows to look at yet, so it may be a graph of its own.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    assert all(relative_error(ours[i], theirs[i]) < 1e-5 for i in theirs) and ours[0].data_ptr() == address


def test_moved_weights_in_a_compiled_region():
    model = patched("numba")
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = run(IDS[:, :6], use_cache=False).logits
    other = loud_adapter(patch_model(tiny_model(num_hidden_layers=1, seed=3)), seed=4)
    model.load_state_dict(other.state_dict())
    expected = other(IDS[:, :6], use_cache=False).logits
    assert relative_error(run(IDS[:, :6], use_cache=False).logits, expected) < 1e-5
    model.to(torch.float64).to(torch.float32)
    assert relative_error(run(IDS[:, :6], use_cache=False).logits, expected) < 1e-5
    assert relative_error(first, expected) > 1e-3
    copied = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert relative_error(copied(IDS[:, :6], use_cache=False).logits, expected) < 1e-5


def test_replaced_parameters_in_a_compiled_region():
    model = patched("numba")
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(IDS[:, :6], use_cache=False)
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight * 2)
    attention.delta_memory.memory_v_proj = torch.nn.Parameter(attention.delta_memory.memory_v_proj * 2)
    assert relative_error(run(IDS[:, :6], use_cache=False).logits, tiny_logits(model, 6)) < 1e-5


def test_a_compiled_model_is_patched_inside():
    expected, model, ids = loud_adapter(patch_model(tiny_model())), tiny_model(), torch.arange(5, 25)[None]
    compiled = torch.compile(model, backend="eager")
    assert patch_model(compiled) is compiled
    loud_adapter(model)
    assert is_patched(model) and is_patched(compiled) and len(layer_paths(compiled)) == 3
    memory = MemoryState.zeros(compiled)
    with torch.no_grad():
        out = compiled(ids, memory=memory, use_cache=False).logits
        assert relative_error(out, expected(ids, use_cache=False).logits) < 1e-5 and memory[0].norm() > 0
        assert unpatch_model(compiled) is compiled
        assert torch.equal(compiled(ids, use_cache=False).logits, tiny_model()(ids, use_cache=False).logits)
    assert not is_patched(compiled)
