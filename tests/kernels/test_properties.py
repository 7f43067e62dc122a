"""The properties of the delta rule on the CPU backends: the same checks that the kernels pass."""

import contextlib
import types

import pytest
import torch
from drawn_rules import GUARDS, drawn_rules
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_kernels.numba import ops as numba_backend
from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.segment_means import segment_means

RULES = drawn_rules([1, 3, 8, 12], [1, 2, 3], GUARDS)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**20)
# numba compiles once per rank, in the first example that meets it
examples = settings(deadline=None, max_examples=30, derandomize=True, database=None)


@contextlib.contextmanager
def properties_of(backend):
    """kernel_properties, run on a CPU backend; ``chunk`` means nothing to it."""
    kernel_properties = pytest.importorskip("kernel_properties", reason="needs Triton to be installed")
    scan = types.SimpleNamespace(scan=lambda *args, chunk=None, **kwargs: backend.scan(*args, **kwargs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_properties, "kernel", scan)
        patch.setattr(kernel_properties, "step", backend.step)
        patch.setattr(kernel_properties, "read", backend.read)
        yield kernel_properties


@pytest.fixture(scope="module", params=("numba", "reference"))
def check(request):
    with properties_of({"numba": numba_backend, "reference": reference}[request.param]) as properties:
        yield properties


@pytest.fixture(scope="module")
def check_bits():
    """For what holds to the bit: of numba's loops. PyTorch's own tanh rounds by a token's place in memory."""
    with properties_of(numba_backend) as properties:
        yield properties


@examples
@given(rule=RULES, dtype=DTYPES, seed=SEEDS, batch=st.integers(0, 3), length=st.integers(0, 90), masked=st.booleans())
def test_equals_the_reference(check, rule, dtype, seed, batch, length, masked):
    x, bias, state, mask = check.random_problem(rule, batch, length, dtype, seed=seed, masked=masked)
    check.check_scan(rule, x, bias, None if seed % 3 == 0 else state, mask=mask, checkpoint_every=seed % 5)
    check.check_read(rule, x, state, mask=mask)


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(1, 80), data=st.data())
def test_any_split_is_the_whole(check, rule, seed, length, data):
    x, bias, state, mask = check.random_problem(rule, 2, length, seed=seed, masked=True)
    check.check_split(rule, x, bias, state, mask, data.draw(st.integers(0, length)), chunk=None)


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(1, 80), data=st.data())
def test_any_split_is_the_whole_to_the_bit(check_bits, rule, seed, length, data):
    x, bias, state, mask = check_bits.random_problem(rule, 2, length, seed=seed, masked=True)
    check_bits.check_split(rule, x, bias, state, mask, data.draw(st.integers(0, length)), chunk=0)


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(1, 80), data=st.data())
def test_a_masked_token_is_a_removed_token(check_bits, rule, seed, length, data):
    x, bias, state, mask = check_bits.random_problem(rule, 2, length, seed=seed, masked=True)
    check_bits.check_masked_inside(rule, x, bias, state, mask)
    check_bits.check_masked_tail(rule, x, bias, state, data.draw(st.integers(0, length)), None)


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(1, 30))
def test_masked_tokens_in_the_reference(rule, seed, length):
    make = torch.Generator().manual_seed(seed)
    x, state = torch.randn(1, length, rule.width, generator=make), torch.randn(1, rule.heads, rule.rank, rule.rank)
    bias, mask = torch.randn(rule.bias_width, generator=make), torch.rand(1, length, generator=make) > 0.4
    masked = reference.scan(x, bias, state, rule, mask=mask, checkpoint_every=1)
    removed = reference.scan(x[:, mask[0]], bias, state, rule)
    torch.testing.assert_close(masked.state, removed.state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked.reads[mask], removed.reads[0], rtol=1e-5, atol=1e-5)
    assert not masked.reads[~mask].any()
    before = torch.cat([state[:, None], masked.checkpoints[:, :-1]], 1)
    assert torch.equal(masked.checkpoints[~mask], before[~mask])


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(1, 40))
def test_a_closed_gate_leaves_only_decay(check, rule, seed, length):
    x, bias, state, _ = check.random_problem(rule, 2, length, seed=seed)
    check.check_closed_gate(rule, x, bias, state, None)


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(1, 40))
def test_rows_permute_and_strides_do_not_matter(check_bits, rule, seed, length):
    problem = check_bits.random_problem(rule, 4, length, seed=seed, masked=True)
    check_bits.check_rows_permute(rule, *problem, None)
    check_bits.check_strides(rule, *problem, None)


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("rank", (1, 8, 12))
def test_orthonormal_keys_recall_exactly(check, rank, normalize):
    check.check_recall(rank, normalize, None)


@examples
@given(rule=RULES, seed=SEEDS, length=st.integers(2, 30))
def test_a_token_that_is_not_finite_is_masked_and_counted(check, rule, seed, length):
    x, bias, state, _ = check.random_problem(rule, 2, length, seed=seed)
    check.check_not_finite(rule, x, bias, state, None)


@examples
@given(rule=RULES, seed=SEEDS, lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5), every=st.integers(0, 4))
def test_packed_sequences_are_apart(check, rule, seed, lengths, every):
    x, bias, _, mask = check.random_problem(rule, 1, sum(lengths), seed=seed, masked=True)
    pool = check.random_problem(rule, len(lengths) + 3, 1, seed=seed + 1)[2]
    check.check_packed(rule, x, bias, pool[: len(lengths)], mask, lengths, 0, every)
    slots = torch.randperm(len(lengths) + 3, generator=torch.Generator().manual_seed(seed))[: len(lengths)]
    slots[seed % len(lengths)] = -1
    check.check_packed(rule, x, bias, pool, mask, lengths, 0, slots=slots)


@examples
@given(rule=RULES, dtype=DTYPES, seed=SEEDS, batch=st.integers(1, 4))
def test_steps_are_a_scan(check, rule, dtype, seed, batch):
    x, bias, state, mask = check.random_problem(rule, batch, 4, dtype, seed=seed, masked=True)
    check.check_step(rule, x, bias, state, mask)
    pool = check.random_problem(rule, batch + 2, 1, seed=seed + 1)[2]
    slots = torch.randperm(batch + 2, generator=torch.Generator().manual_seed(seed))[:batch]
    slots[0] = -1
    check.check_step(rule, x, bias, pool, mask, slots=slots)


@pytest.mark.parametrize("mode", ("standard", "lambda_outside", "no_lambda"))
@pytest.mark.parametrize("coupled", (True, False))
@pytest.mark.parametrize("row_gates", (True, False))
def test_reference_gradients(mode, coupled, row_gates):
    rule = DeltaRule(2, 2, mode, row_gates, coupled)
    double = {"dtype": torch.float64, "requires_grad": True}
    x, bias = torch.randn(2, 3, rule.width, **double), torch.randn(rule.bias_width, **double)
    state = torch.randn(2, 2, 2, 2, **double)
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def run(x, bias, state):
        out = reference.scan(x, bias, state, rule, mask=mask, checkpoint_every=2, dtype=torch.float64)
        return out.reads, out.state, out.checkpoints

    assert torch.autograd.gradcheck(run, (x, bias, state))


def test_zero_raw_vectors_have_finite_gradients():
    rule = DeltaRule(4)
    x = torch.zeros(1, 3, rule.width, requires_grad=True)
    out = reference.scan(x, torch.zeros(4), torch.ones(1, 1, 4, 4), rule)
    (grad,) = torch.autograd.grad(out.reads.sum() + out.state.sum(), x)
    assert torch.isfinite(grad).all()


def test_a_gate_that_bfloat16_would_saturate_stays_contracting():
    # The same key and alternating values: along the key the map has eigenvalue 1 − 2β, close to −1, so S grows
    # towards 1 / (2 (1 − β)) = 1491; with β rounded to 1 it would grow by 1 a token, for ever.
    rule, steps = DeltaRule(3), 40_000
    x = torch.zeros(1, steps, rule.width)
    x[..., 3:6] = torch.tensor([1.0, 0.5, -0.5])
    x[..., 6:9] = torch.tensor([1.0, -1.0]).repeat(steps // 2)[None, :, None]
    x[..., 9:] = 8.0
    assert torch.sigmoid(torch.tensor(8.0).bfloat16()) == 1.0
    out = numba_backend.scan(x.bfloat16(), torch.zeros(3), None, rule, checkpoint_every=1000)
    norms = out.checkpoints.flatten(2).norm(dim=-1)[0] / 3**0.5  # three equal rows
    assert norms.max() < 1 / (2 * (1 - torch.sigmoid(torch.tensor(8.0)))) * 1.01
    assert norms[-1] - norms[-10] < 1e-2 * norms[-1]


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(seed=SEEDS, batch=st.integers(1, 3), length=st.integers(1, 20), names=st.integers(1, 5), masked=st.booleans())
def test_segment_means(seed, batch, length, names, masked):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, 6, generator=make)
    ids = torch.randint(-1, names, (batch, length), generator=make) * 7
    ids[ids < 0] = -1
    mask = torch.rand(batch, length, generator=make) > 0.3 if masked else None
    x[0, 0, 0] = float("nan")
    means, present, skipped = segment_means(x, ids, mask)
    for b in range(batch):
        used = (ids[b] >= 0) & torch.isfinite(x[b]).all(-1)
        wanted = used if mask is None else used & mask[b]
        expected = [x[b][wanted & (ids[b] == i)].mean(0) for i in ids[b][wanted].unique(sorted=True)]
        assert present[b].sum() == len(expected) and present[b, : len(expected)].all()
        for n, mean in enumerate(expected):
            torch.testing.assert_close(means[b, n], mean)
    unmasked = (ids[0, 0] >= 0) and (mask is None or mask[0, 0])
    assert skipped.tolist() == [int(unmasked)] + [0] * (batch - 1)


@pytest.mark.parametrize("backend", (reference, numba_backend))
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"projections": torch.zeros(2, 3, 7)}, ValueError, r"projections: got shape \[2, 3, 7\], allowed"),
        ({"projections": torch.zeros(2, 3, 16, dtype=torch.int64)}, TypeError, "projections: got dtype torch.int64"),
        ({"gate_bias": torch.zeros(3)}, ValueError, r"gate_bias: got shape \[3\], allowed \[4\]"),
        ({"state": torch.zeros(2, 1, 4, 5)}, ValueError, r"state: got shape \[2, 1, 4, 5\], allowed"),
        ({"state": torch.zeros(3, 1, 4, 4)}, ValueError, "state: got 3 rows for 2 sequences"),
        ({"state": torch.zeros(2, 1, 4, 4).half()}, TypeError, "state: got dtype torch.float16"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"mask: got shape \[2, 2\], allowed \[2, 3\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: got dtype torch.float32, allowed bool"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, ValueError, r"slots: got shape \[3\], allowed \[2\]"),
        ({"slots": torch.zeros(2)}, TypeError, "slots: got dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"projections: got shape \[2, 3, 16\] with cu_seqlens"),
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every: got -1"),
    ],
)
def test_mistaken_arguments(backend, changes, kind, message):
    arguments = {
        "projections": torch.zeros(2, 3, 16), "gate_bias": torch.zeros(4), "state": torch.zeros(2, 1, 4, 4),
    } | changes  # fmt: skip
    with pytest.raises(kind, match=message):
        backend.scan(rule=DeltaRule(4), **arguments)


@pytest.mark.parametrize("bounds", ([0, 2], [1, 3], [0, 2, 1, 3]))
@pytest.mark.parametrize("backend", (reference, numba_backend))
def test_mistaken_bounds(backend, bounds):
    with pytest.raises(ValueError, match="cu_seqlens: got .*allowed a non-decreasing list from 0 to T = 3"):
        backend.scan(torch.zeros(1, 3, 16), torch.zeros(4), None, DeltaRule(4), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize(("arguments", "message"), [({"rank": 0}, "rank"), ({"rank": 4, "heads": 0}, "heads")])
def test_mistaken_rules(arguments, message):
    with pytest.raises(ValueError, match=f"{message}: got 0"):
        DeltaRule(**arguments)
