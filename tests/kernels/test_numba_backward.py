"""The gradients of the CPU backend against autograd of the reference in float64, and what they cost in memory."""

import dataclasses
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_keys import RAW
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.schemas import flat_rule

pytest.importorskip("numba", reason="the CPU backend needs numba")
from deltamem_kernels.numba import loops, ops, recurrence
from deltamem_kernels.numba.backward import backward_loops
from deltamem_kernels.numba.machine import changed
from deltamem_kernels.numba.rows import row_loop, turn_loop

RANKS = (8, 1, 3)  # for each the loops are compiled
RULES = st.builds(
    DeltaRule,
    rank=st.sampled_from(sorted(RANKS)),
    heads=st.integers(1, 3),
    mode=st.sampled_from(["standard", "lambda_outside", "no_lambda"]),
    row_gates=st.booleans(),
    coupled=st.booleans(),
    normalize=st.booleans(),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**20)
examples = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def assert_budget(actual, float32, oracle, what):
    """The error against a float64 oracle is at most a few times that of plain float32, plus rounding."""
    assert actual.dtype == float32.dtype and actual.shape == oracle.shape, what
    if oracle.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    rounding = 16 * torch.finfo(torch.float32).eps + (eps if eps > 1e-6 else 0)
    actual, float32, oracle = actual.double(), float32.double(), oracle.double()
    error = (actual - oracle).abs().max().item()
    budget = 4 * (float32 - oracle).abs().max().item() + rounding * max(1.0, oracle.abs().max().item())
    assert error <= budget, f"{what}: error {error:.3g}, allowed {budget:.3g}"  # False for NaN


def problem(rule, batch, length, seed, dtype=torch.float32, states=None):
    """projections, gate_bias and state; sizes from far below to well above 1."""
    make = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(batch, length, 1, generator=make))
    if not rule.normalize:
        sizes = sizes.clamp(max=2.0) * RAW
    x = (torch.randn(batch, length, rule.width, generator=make) * sizes).to(dtype)
    bias = torch.randn(rule.bias_width, generator=make) - 1.0
    state = torch.randn(batch if states is None else states, rule.heads, rule.rank, rule.rank, generator=make)
    return x, bias, state


def weighted(outputs, seed):
    """Σ of every output with random weights, the same in any dtype."""
    make = torch.Generator().manual_seed(seed)
    return sum((o * torch.randn(o.shape, generator=make)).sum() for o in outputs)


def gradients(function, tensors, dtype, seed):
    """Gradients of a random sum of what ``function`` returns; float64 if ``dtype`` says so."""
    leaves = [t.to(dtype) if dtype == torch.float64 else t.clone() for t in tensors]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = weighted(function(*leaves), seed)
    if not loss.requires_grad:  # no token and no state: nothing depends on anything
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    loss.backward()
    return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)


def check_gradients(tensors, rule, seed=0, **arguments):
    """scan's gradients; ``tensors`` are projections, gate_bias and a state, or no state."""

    def run(scan, **more):
        def call(x, bias, state=None):
            out = scan(x, bias, state, rule, **arguments, **more)
            return [out.reads, out.state] + ([out.checkpoints] if arguments.get("checkpoint_every") else [])

        return call

    ours = gradients(run(ops.scan), tensors, None, seed)
    plain = gradients(run(reference.scan), tensors, None, seed)
    oracle = gradients(run(reference.scan, dtype=torch.float64), tensors, torch.float64, seed)
    for name, *three in zip(("projections", "gate_bias", "state"), ours, plain, oracle):
        assert_budget(*three, name)
    return ours


@pytest.mark.compiles
@pytest.mark.parametrize("rank", (*RANKS, pytest.param(12, marks=pytest.mark.soak)))
@settings(examples, max_examples=14)
@given(
    rule=RULES, dtype=DTYPES, seed=SEEDS, batch=st.integers(0, 3), length=st.integers(0, 150), masked=st.booleans(),
    every=st.integers(0, 4), broken=st.booleans(), with_state=st.booleans(),
)  # fmt: skip
def test_rows(rank, rule, dtype, seed, batch, length, masked, every, broken, with_state):
    rule = dataclasses.replace(rule, rank=rank)
    x, bias, state = problem(rule, batch, length, seed, dtype)
    make = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, length, generator=make) > 0.3 if masked else None
    bad = torch.rand(batch, length, generator=make) > 0.8
    if broken:
        column = seed % rule.width
        x[..., column] = torch.where(bad, float("nan") if seed % 2 else float("inf"), x[..., column])
    tensors = (x, bias, state) if with_state else (x, bias)
    d_x = check_gradients(tensors, rule, seed, mask=mask, checkpoint_every=every)[0]
    if masked:
        assert not d_x[~mask].any()
    if broken:
        assert not d_x[bad].any()


@examples
@given(
    rule=RULES, seed=SEEDS, lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4), every=st.integers(0, 4),
    with_slots=st.booleans(), masked=st.booleans(),
)  # fmt: skip
def test_packed_sequences(rule, seed, lengths, every, with_slots, masked):
    count, total = len(lengths), sum(lengths)
    tensors = problem(rule, 1, total, seed, states=count + 2 * with_slots)
    make = torch.Generator().manual_seed(seed)
    slots = torch.randperm(count + 2, generator=make)[:count] if with_slots else None
    if with_slots:
        slots[seed % count] = -1
    mask = torch.rand(1, total, generator=make) > 0.3 if masked else None
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    check_gradients(tensors, rule, seed, mask=mask, cu_seqlens=bounds, slots=slots, checkpoint_every=every)


def test_slots_and_a_state_that_two_rows_start_from():
    rule = DeltaRule(3, 2)
    tensors = problem(rule, 4, 70, seed=3, states=6)
    d_x, _, d_state = check_gradients(tensors, rule, slots=torch.tensor([4, -1, 0, 4]))
    assert not d_x[1].any() and not d_state[[1, 2, 3, 5]].any() and d_state[4].any()


@pytest.mark.parametrize("heads", (1, 4))
def test_a_long_sequence(heads):
    rule = DeltaRule(8, heads)
    check_gradients(problem(rule, 1, 2048, seed=5), rule, checkpoint_every=512)


@examples
@given(
    rule=RULES, dtype=DTYPES, seed=SEEDS, batch=st.integers(0, 3), length=st.integers(0, 150), masked=st.booleans(),
    with_slots=st.booleans(),
)  # fmt: skip
def test_reads_of_a_frozen_state(rule, dtype, seed, batch, length, masked, with_slots):
    x, _, state = problem(rule, batch, length, seed, dtype, states=batch + 1 if with_slots else batch)
    make = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, length, generator=make) > 0.3 if masked else None
    slots = torch.randint(-1, batch + 1, (batch,), generator=make) if with_slots else None
    bad = torch.rand(batch, length, generator=make) > 0.9
    x[..., seed % rule.width] = torch.where(bad, float("nan"), x[..., seed % rule.width])

    def run(backend, **more):
        return lambda x, state: [backend.read(x, state, rule, mask=mask, slots=slots, **more)]

    ours = gradients(run(ops), (x, state), None, seed)
    plain = gradients(run(reference), (x, state), None, seed)
    oracle = gradients(run(reference, dtype=torch.float64), (x, state), torch.float64, seed)
    for name, *three in zip(("projections", "state"), ours, plain, oracle):
        assert_budget(*three, name)
    assert not ours[0][..., rule.read_width :].any() and not ours[0][bad].any()


@pytest.mark.parametrize("lead", [(7,), (2, 5), (0,), ()])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("normed", (False, True))
def test_steer(lead, dtype, normed):
    make = torch.Generator().manual_seed(0)
    base, weight = torch.randn(*lead, 48, generator=make).to(dtype), torch.randn(48, 16, generator=make).to(dtype)
    given = base, torch.randn(*lead, 16, generator=make), weight, torch.rand(48, generator=make)

    def run(backend):
        return lambda b, r, w, n: [backend.steer(b, r, w, 2.0, norm_weight=n if normed else None)]

    outputs = [run(backend)(*given)[0] for backend in (ops, reference)]
    assert_budget(*outputs, run(reference)(*[t.double() for t in given])[0], "output")
    ours, plain = (gradients(run(backend), given, None, 0) for backend in (ops, reference))
    oracle = gradients(run(reference), given, torch.float64, 0)
    for name, *three in zip(("base", "reads", "weight", "norm"), ours, plain, oracle):
        assert_budget(*three, name)


def test_saturated_and_zero_projections():
    rule = DeltaRule(3, coupled=False)
    x, bias, state = problem(rule, 1, 6, seed=6)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, 40.0, -40.0
    x[0, 3, 0], x[0, 3, 1:] = 30.0, 1e-9
    check_gradients((x, bias, state), rule)


def backward(rule, x, bias, state, seed=1):
    return gradients(lambda *t: ops.scan(*t, rule, checkpoint_every=50)[:2], (x, bias, state), None, seed)


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_same_bits_on_every_run_and_any_number_of_threads():
    import numba

    rule = DeltaRule(8, 2)
    given = problem(rule, 5, 130, seed=7)
    first = backward(rule, *given)
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            assert same_bits(backward(rule, *given), first)
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])
    with ThreadPoolExecutor(2) as pool:
        assert all(same_bits(out, first) for out in pool.map(lambda _: backward(rule, *given), range(6)))


def test_a_row_does_not_see_the_others():
    rule = DeltaRule(8)
    x, bias, state = problem(rule, 4, 100, seed=8)
    leaves = [x.clone().requires_grad_(), bias, state.clone().requires_grad_()]
    whole = torch.autograd.grad(ops.scan(*leaves, rule).reads.sum(), (leaves[0], leaves[2]))
    leaves = [x[2:3].clone().requires_grad_(), bias, state[2:3].clone().requires_grad_()]
    alone = torch.autograd.grad(ops.scan(*leaves, rule).reads.sum(), (leaves[0], leaves[2]))
    assert all(torch.equal(w[2:3], a) for w, a in zip(whole, alone))


def test_what_comes_back_for_a_token_that_does_not_count_is_not_looked_at():
    rule = DeltaRule(3)
    x, bias, state = problem(rule, 2, 5, seed=9)
    x[1, 1, 4], x[1, 4, 0] = float("nan"), float("inf")
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2] = False
    leaves = [t.requires_grad_() for t in (x, bias, state)]
    out = ops.scan(*leaves, rule, mask=mask)
    d_reads = torch.randn(2, 5, 3)
    clean = torch.autograd.grad(out.reads, leaves, d_reads, retain_graph=True)
    d_reads[0, 2], d_reads[1, 1], d_reads[1, 4] = float("nan"), float("inf"), float("nan")
    assert same_bits(torch.autograd.grad(out.reads, leaves, d_reads), clean)
    assert all(torch.isfinite(g).all() for g in clean)


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(reentrant):
    rule = DeltaRule(8)
    given = problem(rule, 2, 70, seed=10)
    plain = gradients(lambda *t: ops.scan(*t, rule)[:2], given, None, 0)
    again = gradients(
        lambda *t: checkpoint(lambda *u: tuple(ops.scan(*u, rule)[:2]), *t, use_reentrant=reentrant),
        given, None, 0,
    )  # fmt: skip
    assert same_bits(again, plain)


def test_tensors_used_twice_and_a_graph_walked_twice():
    rule = DeltaRule(3)
    leaves = [t.requires_grad_() for t in problem(rule, 2, 9, seed=11)]
    once = torch.autograd.grad(ops.scan(*leaves, rule).reads.sum(), leaves)
    loss = ops.scan(*leaves, rule).reads.sum() + ops.scan(*leaves, rule).reads.sum()
    twice = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert same_bits([g * 2 for g in once], twice)
    assert same_bits(torch.autograd.grad(loss, leaves), twice)


def test_only_some_of_the_inputs_want_a_gradient():
    rule = DeltaRule(3)
    given = [t.requires_grad_() for t in problem(rule, 2, 9, seed=12)]
    whole = torch.autograd.grad(ops.scan(*given, rule).state.sum(), given)
    for i in range(3):
        leaves = [t.detach().clone() for t in given]
        leaves[i].requires_grad_()
        (grad,) = torch.autograd.grad(ops.scan(*leaves, rule).state.sum(), leaves[i])
        assert torch.equal(grad, whole[i])


def test_second_derivatives_are_refused():
    rule = DeltaRule(3)
    leaves = [t.requires_grad_() for t in problem(rule, 1, 3, seed=13)]
    (grad,) = torch.autograd.grad(ops.scan(*leaves, rule).reads.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_the_op_passes_torchs_own_checks():
    rule = DeltaRule(3, 2)
    x, bias, pool = problem(rule, 1, 9, seed=14, states=4)
    flags = flat_rule(rule)
    bounds, slots = torch.tensor([0, 4, 4, 9]), torch.tensor([2, 0, -1])
    grads = torch.randn(1, 9, 6), torch.randn(3, 2, 3, 3), torch.randn(4, 2, 3, 3)
    op = recurrence.scan_backward_op
    torch.library.opcheck(op, (*grads, x, bias, pool, None, bounds, slots, *flags, 2))
    torch.library.opcheck(recurrence.read_backward_op, (grads[0], x, pool, x[..., 0] > 0, slots[:1], *flags))
    torch.library.opcheck(recurrence.read_op, (x.requires_grad_(), pool, None, slots[:1], *flags))
    x = x.detach()
    torch.library.opcheck(op, (*grads, x.bfloat16(), bias.bfloat16(), None, x[..., 0] > 0, bounds, None, *flags, 2))


def test_compiled():
    rule = DeltaRule(3, 2)
    given = problem(rule, 2, 9, seed=15)

    def run(*tensors):
        return ops.scan(*tensors, rule, checkpoint_every=2)[:2]

    plain = gradients(run, given, None, 0)
    assert same_bits(gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), given, None, 0), plain)

    def read(x, state):
        return [ops.read(x, state, rule)]

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    assert same_bits(gradients(compiled, given[::2], None, 0), gradients(read, given[::2], None, 0))


def test_peak_memory_as_pytorch_counts_it():
    rule, length = DeltaRule(8), 8192
    leaves = [t.requires_grad_() for t in problem(rule, 1, length, seed=16)]
    loss = ops.scan(*leaves, rule).reads.sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        torch.autograd.grad(loss, leaves)
    live = top = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    d_reads = length * rule.read_width * 4
    d_projections = length * rule.width * 4
    assert d_projections < top < d_projections + d_reads + 0.1 * length * rule.rank**2 * 4


# numba's own buffers are in nobody's books but the process's.
PEAK = """
import re, torch
from deltamem_kernels.numba import ops
from deltamem_kernels.rule import DeltaRule
torch.set_num_threads(1)
rule = DeltaRule(8)

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

def run(length):
    leaves = torch.zeros(1, length, rule.width).requires_grad_(), torch.zeros(8), torch.zeros(1, 1, 8, 8)
    reads = ops.scan(*leaves, rule).reads
    weights = torch.ones_like(reads)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
    before = status("VmRSS")
    torch.autograd.grad(reads, leaves[0], weights)
    return status("VmHWM") - before

run(1000)
print(run(1 << 18))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_as_the_process_counts_it():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    length, rule = 1 << 18, DeltaRule(8)
    beyond = int(done.stdout) - length * rule.width * 4  # the gradient of the projections
    assert -(4 << 20) < beyond < 0.2 * length * rule.rank**2 * 4


def test_a_caller_hands_no_fast_math_down():
    """A function that says nothing of fast-math gets its first caller's, so bits would depend on who came first."""
    import numpy as np
    from numba import njit

    callee = njit(**loops.OPTIONS | {"cache": False})(loops.squares.py_func)

    @njit(fastmath=True)
    def caller(x, out):
        callee(x, out)

    x = np.ones(8, np.float32)
    caller(x, x.copy())
    (code,) = callee.inspect_llvm().values()
    assert "fmul float" in code or "fmul <" in code
    assert "fmul fast" not in code


def test_numbas_cache_notices_every_file(tmp_path):
    """What is compiled in from another file is a number in the closure, which numba's cache on disk looks at."""
    file = tmp_path / "module.py"
    file.write_text("")
    module = types.SimpleNamespace(__file__=str(file))
    numbers = [changed(module)]
    os.utime(file, ns=(0, 1))
    assert changed(module) not in numbers
    with_loops, alone = changed(loops), changed()
    functions = {alone: [*vars(loops.scan_loops(8)).values()]}
    functions[with_loops] = [*vars(backward_loops(8)).values(), row_loop(8), turn_loop()]
    for stamp, compiled in functions.items():
        for function in compiled:
            closure = function.py_func.__closure__
            assert stamp in [cell.cell_contents for cell in closure], function.py_func.__name__


@pytest.mark.parametrize("raw, has_gradient", [(-0.1, True), (0.0, True), (0.1, False)])
def test_a_gate_that_is_on_its_bound_by_itself_has_a_gradient(raw, has_gradient):
    # An adapter that starts with every gate there would never train.
    rule = DeltaRule(8, beta_max=0.5)
    x = torch.randn(1, 4, rule.width, generator=torch.Generator().manual_seed(0))
    x[..., 24:] = raw
    found = []
    for backend in (recurrence.scan, reference.scan):
        given = x.clone().requires_grad_()
        backend(given, torch.zeros(8), None, rule).state.square().sum().backward()
        found.append(given.grad[..., 24:])
    assert bool(found[0].abs().sum() > 0) is has_gradient
    torch.testing.assert_close(*found)
