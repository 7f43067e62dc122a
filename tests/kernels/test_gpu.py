"""The kernels on a GPU, at real sizes: the properties that the interpreter checks at small ones.

Nearly all of the time goes into compiling: every rule, dtype, stride and length is a kernel of its own. What is not
marked ``soak`` has every kernel in every dtype and every rule in one of them, some 900 kernels, and fits the few
minutes of ``make gpu``; ``pytest -m gpu`` runs the whole product, three times as many.
"""

import itertools

import pytest
import torch
from drawn_rules import GUARDS

from deltamem_kernels.rule import DeltaRule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RULES = {
    "released": DeltaRule(8),
    "four heads": DeltaRule(8, 4),
    "uncoupled": DeltaRule(8, 1, "lambda_outside", True, False),
    "no lambda, head gates": DeltaRule(8, 2, "no_lambda", False),
    "rank 3, raw": DeltaRule(3, 2, normalize=False),
    "rank 16": DeltaRule(16),
    "rank 17": DeltaRule(17),
    "rank 64": DeltaRule(64),
    "held": DeltaRule(8, 2, "lambda_outside", True, False, True, *GUARDS[1]),
}
# The released rule in every dtype, and each other rule in one.
CHOSEN = [
    *itertools.product(["released"], DTYPES),
    ("four heads", torch.bfloat16), ("uncoupled", torch.float16), ("no lambda, head gates", torch.float32),
    ("rank 3, raw", torch.bfloat16), ("rank 16", torch.float16), ("rank 17", torch.float32),
    ("rank 64", torch.bfloat16), ("held", torch.bfloat16),
]  # fmt: skip


def each(names, first, *axes):
    """Parametrize over a product whose combinations outside of ``first`` are for ``soak``."""
    first = [one if isinstance(one, tuple) else (one,) for one in first]
    params = [
        pytest.param(
            *(RULES.get(value, value) if isinstance(value, str) else value for value in values),
            id="-".join(map(str, values)), marks=() if values in first else pytest.mark.soak,
        )
        for values in itertools.product(*axes)
    ]  # fmt: skip
    assert sum(not param.marks for param in params) == len(first)
    return pytest.mark.parametrize(names, params)


# Half a minute each; the others are for ``soak``.
THOROUGH = [CHOSEN[0], ("rank 3, raw", torch.bfloat16), ("rank 16", torch.float16), ("rank 17", torch.float32)]
any_rule_and_dtype = each("rule,dtype", CHOSEN, RULES, DTYPES)
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rules(*first):
    """Every rule; those not named are for ``soak``."""
    return each("rule", first, RULES)


@pytest.fixture(autouse=True)
def properties(monkeypatch):
    import kernel_properties

    from deltamem_kernels.triton import launch

    monkeypatch.setattr(launch, "empty", kernel_properties.poisoned)
    return kernel_properties


@any_rule_and_dtype
@pytest.mark.parametrize("length", [1, 100, 700])
def test_scan(properties, rule, dtype, length):
    x, bias, state, mask = properties.random_problem(rule, 3, length, dtype, DEVICE, seed=length, masked=True)
    properties.check_scan(rule, x, bias, state, mask=mask, checkpoint_every=64)
    properties.check_scan(rule, x, bias, None)


@rules("released", "uncoupled", "rank 16")
def test_chunks(properties, rule):
    if rule.rank > 16:
        pytest.skip("no chunks above rank 16")
    for length in (0, 1, 31, 32, 33, 64, 65, 300):
        x, bias, state, _ = properties.random_problem(rule, 2, length, torch.bfloat16, DEVICE, seed=length)
        properties.check_scan(rule, x, bias, state, chunk=32, checkpoint_every=48)


@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("name", ["released", "four heads"])
def test_long(properties, name, length):
    """Three launches = one token after another (which the other tests compare with the reference)."""
    from deltamem_kernels.triton.scan import scan

    rule = RULES[name]
    x, bias, state, mask = properties.random_problem(rule, 2, length, torch.bfloat16, DEVICE, masked=True)
    chunked = scan(x, bias, state, rule, mask=mask, checkpoint_every=1024)
    plain = scan(x, bias, state, rule, mask=mask, checkpoint_every=1024, chunk=0)
    for name in ("reads", "state", "checkpoints"):
        a, b = getattr(chunked, name), getattr(plain, name)
        assert (a - b).norm() <= 1e-5 * b.norm() and torch.isfinite(a).all()
    again = scan(x, bias, state, rule, mask=mask, checkpoint_every=1024)
    assert torch.equal(again.reads, chunked.reads) and torch.equal(again.state, chunked.state)


@any_rule_and_dtype
def test_to_the_bit(properties, rule, dtype):
    chunks = (0, 16) if rule.rank <= 16 else (0,)
    problem = properties.random_problem(rule, 4, 70, dtype, DEVICE, seed=1, masked=True)
    x, bias, state, mask = problem
    properties.check_masked_inside(rule, *problem)
    for chunk in chunks:
        properties.check_strides(rule, *problem, chunk)
        properties.check_rows_permute(rule, *problem, chunk)
        properties.check_closed_gate(rule, x, bias, state, chunk)
        properties.check_split(rule, x, bias, state, mask, 32, chunk)
        properties.check_not_finite(rule, x, bias, state, chunk)
        for kept in (0, 5, 16, 69):
            properties.check_masked_tail(rule, x, bias, state, kept, chunk)


@rules("released", "no lambda, head gates", "rank 17")
def test_packed_and_slots(properties, rule):
    lengths = [100, 0, 1, 37, 16, 64, 15, 17]
    x, bias, _, mask = properties.random_problem(rule, 1, sum(lengths), torch.bfloat16, DEVICE, masked=True)
    pool = properties.random_problem(rule, 12, 1, seed=2, device=DEVICE)[2]
    slots = torch.tensor([11, 3, -1, 0, 5, -1, 7, 8], device=DEVICE)
    for chunk in (0, 16) if rule.rank <= 16 else (0,):
        properties.check_packed(rule, x, bias, pool[:8], mask, lengths, chunk, every=7)
        properties.check_packed(rule, x, bias, pool, mask, lengths, chunk, slots=slots)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chunk", [0, 4])
def test_recall(properties, normalize, chunk):
    properties.check_recall(8, normalize, chunk, DEVICE)


@any_rule_and_dtype
@pytest.mark.parametrize("batch", [1, 37, 512])
def test_step(properties, rule, dtype, batch):
    x, bias, state, mask = properties.random_problem(rule, batch, 4, dtype, DEVICE, seed=batch, masked=True)
    x[0, 1, 2] = float("nan")
    properties.check_step(rule, x, bias, state, mask)
    if batch == 37:
        pool = properties.random_problem(rule, 50, 1, seed=3, device=DEVICE)[2]
        slots = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:37].to(DEVICE)
        slots[5] = -1
        properties.check_step(rule, x, bias, pool, mask, slots=slots.int())


@any_rule_and_dtype
def test_read(properties, rule, dtype):
    x, _, state, mask = properties.random_problem(rule, 2, 1000, dtype, DEVICE, masked=True)
    x[1, 7, 0] = float("inf")
    properties.check_read(rule, x, state, mask=mask)
    properties.check_read(rule, x, state, slots=torch.tensor([1, -1], device=DEVICE))


@any_dtype
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("lead", [(1, 1), (16, 1), (512, 1), (1, 3000)])
def test_steer(properties, dtype, normed, lead):
    make = torch.Generator().manual_seed(0)
    base = torch.randn(*lead, 2560, generator=make).to(DEVICE, dtype)
    reads = torch.randn(*lead, 8, generator=make).to(DEVICE)
    weight = torch.randn(2560, 8, generator=make).to(DEVICE, dtype)
    norm_weight = torch.rand(2560, generator=make).to(DEVICE, dtype) if normed else None
    properties.check_steer(base, reads, weight, 2.0, norm_weight)


@any_rule_and_dtype
@pytest.mark.parametrize("length", [1, 100, 300])
def test_scan_gradient(properties, rule, dtype, length):
    x, bias, state, mask = properties.random_problem(rule, 2, length, dtype, DEVICE, seed=length, masked=True)
    properties.check_scan_gradient(rule, x, bias, state, mask=mask, checkpoint_every=64)


@each("rule,dtype", THOROUGH, RULES, DTYPES)
def test_scan_gradient_thoroughly(properties, rule, dtype):
    x, bias, state, mask = properties.random_problem(rule, 2, 300, dtype, DEVICE, seed=300, masked=True)
    properties.check_scan_gradient(rule, x, bias, None)
    properties.check_gradient_bits(rule, x, bias, state, mask)
    properties.check_masked_gradient(rule, x[:, :70], bias, state, mask[:, :70])
    properties.check_not_finite_gradient(rule, x, bias, state)


@rules("released", "no lambda, head gates", "rank 17")
def test_packed_gradient(properties, rule):
    lengths = [100, 0, 1, 37, 16, 64, 15, 17]
    x, bias, _, mask = properties.random_problem(rule, 1, sum(lengths), torch.bfloat16, DEVICE, masked=True)
    pool = properties.random_problem(rule, 12, 1, seed=2, device=DEVICE)[2]
    slots = torch.tensor([11, 3, -1, 0, 5, -1, 11, 8], device=DEVICE)
    chunk = 128 if rule.rank <= 16 else 0
    properties.check_packed_gradient(rule, x, bias, pool[:8], lengths, chunk=chunk, mask=mask, checkpoint_every=7)
    for chunk in (0, 128) if rule.rank <= 16 else (0,):
        properties.check_packed_gradient(rule, x, bias, pool, lengths, slots, chunk=chunk)


@pytest.mark.parametrize("name,length", [("released", 8192), ("released", 32768), ("four heads", 8192)])
def test_long_gradient(properties, name, length):
    """Against float64, whose graph of the whole would be too large: piece after piece from the end."""
    rule = RULES[name]
    x, bias, state, mask = properties.random_problem(rule, 1, length, torch.bfloat16, DEVICE, masked=True)
    weights, found = properties.scan_gradients(rule, x, bias, state, mask=mask)
    assert properties.equal(properties.scan_gradients(rule, x, bias, state, mask=mask)[1], found)
    exact = properties.long_gradient(rule, x, bias, state, weights, mask)
    for what, a, e in zip(("projections", "gate_bias", "state"), found, exact, strict=True):
        allowed = 4e-3 if a.dtype == torch.bfloat16 else 2e-5
        error = ((a.double().cpu() - e).norm() / e.norm()).item()
        assert error < allowed, f"gradient of {what}: relative error {error:.2e}"


@any_rule_and_dtype
def test_read_gradient(properties, rule, dtype):
    x, _, state, mask = properties.random_problem(rule, 2, 1000, dtype, DEVICE, masked=True)
    x[1, 7, 0] = float("inf")
    properties.check_read_gradient(rule, x, state, mask=mask)
    properties.check_read_gradient(rule, x, state, slots=torch.tensor([1, -1], device=DEVICE))


@any_dtype
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("lead,width", [((1, 1), 8), ((2, 300), 8), ((1, 9000), 32)])
def test_steer_gradient(properties, dtype, normed, weight_dtype, lead, width):
    make = torch.Generator().manual_seed(0)
    grad = torch.randn(*lead, 2560, generator=make).to(DEVICE, dtype)
    reads = torch.randn(*lead, width, generator=make).to(DEVICE)
    weight = torch.randn(2560, width, generator=make).to(DEVICE, weight_dtype or dtype)
    norm_weight = torch.rand(2560, generator=make).to(DEVICE, weight_dtype or dtype) if normed else None
    properties.check_steer_gradient(grad, reads, weight, 2.0, norm_weight)
    from deltamem_kernels.triton.steer_backward import steer_backward

    found = [steer_backward(grad, reads, weight, 2.0, norm_weight=norm_weight) for _ in range(2)]
    assert properties.equal(*found)


def test_training_in_a_cuda_graph(properties):
    """Nothing in forward or backward waits for the device: all of it can be captured, packed rows and slots too."""
    from deltamem_kernels.triton import ops

    rule = RULES["released"]
    x, bias, _, _ = properties.random_problem(rule, 1, 500, torch.bfloat16, DEVICE)
    pool = properties.random_problem(rule, 5, 1, seed=2, device=DEVICE)[2]
    cu, slots = torch.tensor([0, 300, 500], device=DEVICE), torch.tensor([4, 4], device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, bias, pool)]

    def gradients():
        out = ops.scan(*leaves, rule, cu_seqlens=cu, slots=slots)
        return torch.autograd.grad(out.reads.square().sum() + out.state.sum(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    graph.replay()
    assert properties.equal(found, expected)


def test_operators_compile(properties):
    from deltamem_kernels.triton import ops

    rule = RULES["released"]
    x, bias, state, mask = properties.random_problem(rule, 2, 300, torch.bfloat16, DEVICE, masked=True)

    def both(x, bias, state):
        out = ops.scan(x, bias, state, rule, mask=mask)
        return out.reads, ops.step(x[:, 0], bias, state, rule), out.state

    one, two = state.clone(), state.clone()
    compiled = torch.compile(both, fullgraph=True)(x, bias, one)
    for a, b in zip((*compiled, one), (*both(x, bias, two), two)):
        assert torch.equal(a, b)


def test_step_in_a_cuda_graph(properties):
    from deltamem_kernels.triton.step import step

    rule = RULES["released"]
    x, bias, state, _ = properties.random_problem(rule, 4, 3, torch.bfloat16, DEVICE)
    token, eager, captured = x[:, 0].clone(), state.clone(), state.clone()
    step(token, bias, state.clone(), rule)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reads = step(token, bias, captured, rule)
    for t in range(3):
        token.copy_(x[:, t])
        graph.replay()
        assert torch.equal(reads, step(x[:, t], bias, eager, rule))
    assert torch.equal(eager, captured)


# Packed heads: 32 / 8 / 8 heads of 128, 2560 outputs (Qwen3-4B), and the odd one.
QWEN = (32, 8, 8, 128, 128)


@pytest.fixture
def heads():
    import heads_properties

    return heads_properties


def decode_problem(properties, heads, rule, layout, batch, dtype, seed=0, rows=1):
    x, bias, state, mask = properties.random_problem(rule, batch, 1, dtype, DEVICE, seed=seed, masked=True)
    packed, cos, sin = heads.random_rows(layout, (batch,), rule.width, dtype, DEVICE, seed=seed, rows=rows)
    packed[:, layout.width :] = x[:, 0]
    return (packed, bias, state), (cos, sin), mask[:, 0]


SHAPES = [QWEN, (3, 1, 2, 24, 8), (4, 2, 1, 16, 0), (2, 1, 1, 256, 64)]
LEADS = [(1, 1), (16, 1), (2, 37), (1, 4096)]


@each(
    "dtype,which,shape,lead",
    [
        *itertools.product(DTYPES, ["qo", "qkvo"], [QWEN], LEADS),
        *itertools.product(DTYPES, ["qkvo"], SHAPES[1:], [(2, 37)]),
        *itertools.product([torch.bfloat16], [""], SHAPES, [(1, 4096)]),
    ],
    DTYPES, ["qo", "qkvo", ""], SHAPES, LEADS,
)  # fmt: skip
def test_steer_heads(properties, heads, dtype, which, shape, lead):
    from deltamem_kernels.layout import HeadLayout

    layout, width = HeadLayout(*shape), 20 if shape[3] == 24 else 8
    packed, cos, sin = heads.random_rows(layout, lead, 32, dtype, DEVICE, rows=lead[0] if which == "qo" else 1)
    reads = torch.randn(*lead, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    steering = heads.random_steering(layout, width, which, lead[1] != 37, {"qo": 0, "qkvo": 4, "": 1}[which],
                                     dtype=dtype, device=DEVICE)  # fmt: skip
    heads.check_steer_heads(layout, packed, reads, steering, cos, sin)


@any_rule_and_dtype
@pytest.mark.parametrize("batch", [1, 16, 512])
def test_decode(properties, heads, rule, dtype, batch):
    from deltamem_kernels.layout import HeadLayout

    layout = HeadLayout(*QWEN)
    given, turn, mask = decode_problem(properties, heads, rule, layout, batch, dtype, batch, batch if batch > 1 else 1)
    given[0][batch // 2, layout.width + 1] = float("nan")
    steering = heads.random_steering(layout, rule.read_width, "qo", outputs=2560, dtype=dtype, device=DEVICE)
    parts = (1, 3, None)
    heads.check_decode(rule, layout, *given, steering, *turn, parts=parts, mask=mask if batch > 1 else None)
    heads.check_decode(rule, layout, *given, steering, *turn, parts=(20, None), frozen=True)
    if batch == 16:
        pool = properties.random_problem(rule, 20, 1, seed=3, device=DEVICE)[2]
        slots = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:16].to(DEVICE)
        slots[5] = -1
        steering = heads.random_steering(layout, rule.read_width, "qkvo", raws=4, dtype=dtype, device=DEVICE)
        heads.check_decode(rule, layout, given[0], given[1], pool, steering, *turn, parts=parts, mask=mask, slots=slots)


@rules("released", "four heads", "rank 17", "rank 64")
@pytest.mark.parametrize("batch,parts", [(1, None), (1, 7), (16, None), (200, None), (512, 5), (3, 1)])
def test_many_decodes(heads, rule, batch, parts):
    """Races: hundreds of launches, one on the heels of the other, with as many programs as will be."""
    from deltamem_kernels.layout import HeadLayout

    layout = HeadLayout(*QWEN[:4])
    steering = heads.random_steering(layout, rule.read_width, "qo", outputs=2560, dtype=torch.bfloat16, device=DEVICE)
    heads.check_many_steps(rule, layout, batch, steering, 300 if batch < 100 else 60, parts, torch.bfloat16, DEVICE)


def test_decode_in_a_cuda_graph(properties, heads):
    from deltamem_kernels.layout import HeadLayout
    from deltamem_kernels.triton.decode import decode_

    rule, layout = RULES["released"], HeadLayout(*QWEN)
    (packed, bias, state), turn, _ = decode_problem(properties, heads, rule, layout, 2, torch.bfloat16)
    steering = heads.random_steering(layout, 8, "qo", outputs=2560, dtype=torch.bfloat16, device=DEVICE)
    arrived = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    row, eager, captured = packed.clone(), state.clone(), state.clone()
    decode_(row.clone(), bias, state.clone(), rule, layout, steering, *turn, workspace=arrived)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reads, delta = decode_(row, bias, captured, rule, layout, steering, *turn, workspace=arrived)
    for seed in range(20):
        token = torch.randn(packed.shape, generator=torch.Generator().manual_seed(seed)).to(packed)
        row.copy_(token)
        graph.replay()
        there = token.clone()
        expected = decode_(there, bias, eager, rule, layout, steering, *turn, workspace=arrived)
        assert torch.equal(reads, expected[0]) and torch.equal(delta, expected[1]) and torch.equal(eager, captured)
        assert torch.equal(row, there)
    assert not arrived.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_heads_compile(properties, heads, frozen):
    from deltamem_kernels.layout import HeadLayout
    from deltamem_kernels.triton import ops

    rule, layout = RULES["four heads"], HeadLayout(*QWEN)
    (packed, bias, state), turn, mask = decode_problem(properties, heads, rule, layout, 3, torch.bfloat16)
    steering = heads.random_steering(layout, 32, "qo", raws=4, outputs=2560, dtype=torch.bfloat16, device=DEVICE)
    arrived = torch.zeros(3, dtype=torch.int32, device=DEVICE)

    def both(packed, state):
        given = {"mask": mask, "workspace": arrived, "frozen": frozen}
        reads, delta = ops.decode_(packed, bias, state, rule, layout, steering, *turn, **given)
        ops.steer_heads_(packed[:, None], reads[:, None], layout, steering, *turn)
        return reads, delta

    ours, theirs = (packed.clone(), state.clone()), (packed.clone(), state.clone())
    compiled = torch.compile(both, fullgraph=True)(*ours)
    # Frozen, the compiled path has no count of arrivals, and the direct one does not use it.
    for a, b in zip((*compiled, *ours), (*both(*theirs), *theirs)):
        assert torch.equal(a, b)


def test_a_million_tokens(properties):
    """Chunks = one token after another = two halves with the state carried."""
    from deltamem_kernels.triton.scan import scan

    rule, length = RULES["released"], 2**20
    x, bias, state, _ = properties.random_problem(rule, 1, length, torch.bfloat16, DEVICE)
    whole = scan(x, bias, state, rule)
    plain = scan(x, bias, state, rule, chunk=0)
    one = scan(x[:, : length // 2], bias, state, rule)
    two = scan(x[:, length // 2 :], bias, one.state, rule)
    for a, b in ((whole.reads, plain.reads), (torch.cat([one.reads, two.reads], 1), plain.reads)):
        assert torch.isfinite(a).all() and (a - b).norm() <= 1e-5 * b.norm()
    for a in (whole.state, two.state):
        assert (a - plain.state).norm() <= 1e-5 * plain.state.norm()


def test_a_million_tokens_of_heads(properties, heads):
    """More numbers than 32 bits count: the last tokens = the same tokens alone."""
    from deltamem_kernels.layout import HeadLayout
    from deltamem_kernels.triton.heads import steer_heads_

    layout, length = HeadLayout(16, 4, 4, 128, 128), 2**20
    packed = torch.randn(1, length, layout.width, device=DEVICE, dtype=torch.bfloat16)
    turn = torch.randn(2, 1, length, 128, device=DEVICE, dtype=torch.bfloat16)
    reads = torch.randn(1, length, 8, device=DEVICE)
    steering = heads.random_steering(layout, 8, "qkv", dtype=torch.bfloat16, device=DEVICE)
    tail = packed[:, -64:].clone()
    steer_heads_(packed, reads, layout, steering, *turn)
    steer_heads_(tail, reads[:, -64:], layout, steering, *turn[:, :, -64:])
    assert torch.equal(packed[:, -64:], tail)
