"""The packed row on a CPU: numba's ``steer_heads_`` and ``decode_`` against the reference in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_keys import RAW
from support import loud_adapter, tiny_model

from deltamem_fast import DeltaMemConfig, patch_model
from deltamem_kernels.layout import HeadLayout, Steering
from deltamem_kernels.reference import heads as reference_heads
from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule

numba_heads = pytest.importorskip("deltamem_kernels.numba.heads", reason="needs numba")
numba_threads = pytest.importorskip("deltamem_kernels.numba.threads", reason="needs numba")

LAYOUTS = st.builds(
    lambda q, k, v, dim, share: HeadLayout(q, k, v, dim, {"none": 0, "half": dim // 4 * 2, "all": dim}[share]),
    q=st.integers(1, 4), k=st.integers(1, 2), v=st.integers(1, 2), dim=st.sampled_from([2, 8, 12, 16]),
    share=st.sampled_from(["none", "half", "all"]),
)  # fmt: skip
RANKS = (8, 1, 3, 12)  # for each the loops are compiled
RULES = st.builds(
    DeltaRule, rank=st.sampled_from(RANKS), heads=st.integers(1, 3),
    mode=st.sampled_from(["standard", "lambda_outside", "no_lambda"]), row_gates=st.booleans(),
    coupled=st.booleans(), normalize=st.booleans(),
)  # fmt: skip
WHICH = st.sets(st.sampled_from("qkvo"))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def problem(layout, width, which, normed, raws, lead, table_rows, extra, seed):
    """packed rows, steering, cos and sin."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=make)

    rows = {head: getattr(layout, head) * layout.dim for head in "qkv"} | {"o": 20}
    steering = Steering(
        **{head: random(rows[head], width) for head in sorted(which)}, scale=0.5, scale_max=1.5,
        scale_raw=random(raws) if raws else None, q_norm=random(layout.dim) if normed else None,
        k_norm=random(layout.dim) if normed else None,
    )  # fmt: skip
    length = lead[1] if len(lead) > 1 else 1
    tables = [random(table_rows, length, layout.rotary) if layout.rotary else None for _ in range(2)]
    return random(*lead, layout.width + extra), steering, *tables


def wide(value):
    if isinstance(value, Steering):
        return Steering(*(wide(part) for part in value))
    return value.double() if isinstance(value, torch.Tensor) else value


def assert_close(actual, exact):
    assert (actual.double() - exact).abs().max() <= 2e-5 * exact.abs().max().clamp(min=1.0)


@settings(max_examples=60, deadline=None)
@given(
    layout=LAYOUTS, width=st.integers(1, 9), which=WHICH, normed=st.booleans(), raws=st.sampled_from([0, 1, 4]),
    batch=st.integers(1, 3), length=st.integers(1, 5), one_table=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_steer_heads(layout, width, which, normed, raws, batch, length, one_table, seed):
    rows = 1 if one_table else batch
    packed, steering, *tables = problem(layout, width, which, normed, raws, (batch, length), rows, 3, seed)
    reads = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))
    exact, before, strided = packed.double(), packed.clone(), torch.cat([packed, packed], -1)[..., : packed.shape[-1]]
    reference_heads.steer_heads_(exact, wide(reads), layout, wide(steering), *map(wide, tables))
    for rows in (packed, strided):
        numba_heads.steer_heads_(rows, reads, layout, steering, *tables)
        assert_close(rows, exact)
        assert torch.equal(rows[..., layout.width :], before[..., layout.width :])


@pytest.mark.compiles
@pytest.mark.parametrize("rank", RANKS)
@settings(max_examples=15, deadline=None)
@given(
    rule=RULES, layout=LAYOUTS, which=WHICH, normed=st.booleans(), raws=st.sampled_from([0, 1, 4]),
    batch=st.integers(1, 4), masked=st.booleans(), slotted=st.booleans(), frozen=st.booleans(), broken=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_decode(rank, rule, layout, which, normed, raws, batch, masked, slotted, frozen, broken, seed):
    rule = dataclasses.replace(rule, rank=rank)
    packed, steering, *tables = problem(
        layout, rule.read_width, which, normed, raws, (batch,), 1 + (batch - 1) * (seed % 2), rule.width, seed
    )  # fmt: skip
    make = torch.Generator().manual_seed(seed)
    if broken:
        packed[0, layout.width] = float("nan")
    bias = torch.randn(rule.bias_width, generator=make)
    state = torch.randn(batch + 2 * slotted, rule.heads, rule.rank, rule.rank, generator=make)
    options = {"frozen": frozen, "mask": torch.rand(batch, generator=make) > 0.4 if masked else None}
    if slotted:
        options["slots"] = torch.randperm(batch + 2, generator=make)[:batch]
        options["slots"][-1] = -1
    exact, exact_state = packed.double(), state.double()
    counts = [torch.zeros(len(state), dtype=torch.int32) for _ in range(3)]
    reads, delta = reference_heads.decode_(
        exact, wide(bias), exact_state, rule, layout, wide(steering), *map(wide, tables), skipped=counts[0], **options
    )  # fmt: skip
    prepared = {}
    for count, prepared in zip(counts[1:], (None, {})):
        for _ in range(2 if frozen else 1):  # the second time with what was prepared in the first
            row, own = packed.clone(), state.clone()
            ours, addend = numba_heads.decode_(
                row, bias, own, rule, layout, steering, *tables, skipped=count, workspace=prepared, **options
            )  # fmt: skip
            assert_close(ours, reads)
            assert_close(own, exact_state)
            assert_close(row[:, : layout.width], exact[:, : layout.width])
            assert (addend is None) == (steering.o is None)
            if addend is not None:
                assert_close(addend, delta)
        assert torch.equal(count, counts[0])


@settings(max_examples=40, deadline=None)
@given(
    rule=RULES, layout=LAYOUTS, which=WHICH, normed=st.booleans(), raws=st.sampled_from([0, 4]),
    batch=st.integers(1, 3), length=st.sampled_from([2, 5, 70]), masked=st.booleans(), broken=st.booleans(),
    frozen=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_prefill(rule, layout, which, normed, raws, batch, length, masked, broken, frozen, seed):
    """A prompt in one call: the definition's numbers, and the very state of its tokens one by one."""
    tables_of = 1 + (batch - 1) * (seed % 2)
    packed, steering, *tables = problem(
        layout, rule.read_width, which, normed, raws, (batch, length), tables_of, rule.width, seed
    )  # fmt: skip
    make = torch.Generator().manual_seed(seed)
    if not rule.normalize:
        packed[..., layout.width :] *= RAW
    if broken:
        packed[0, 1, layout.width] = float("inf")
    bias, mask = torch.randn(rule.bias_width, generator=make), None
    if masked:
        mask = torch.rand(batch, length, generator=make) > 0.4
    first = torch.randn(batch, rule.heads, rule.rank, rule.rank, generator=make)
    exact, exact_state, exact_reads, exact_deltas = packed.double(), first.double(), [], []
    rows, tokens = packed.flatten(0, 1).clone(), packed.clone()
    state, one_by_one = first.clone(), first.clone()
    skipped, counted = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    reads, delta = numba_heads.prefill_(
        rows, length, bias, state, rule, layout, steering, *tables, mask=mask, skipped=skipped, frozen=frozen,
        workspace=None,
    )  # fmt: skip
    for t in range(length):
        turn = [None if table is None else table[:, t : t + 1].contiguous() for table in tables]
        options = {"mask": None if mask is None else mask[:, t], "frozen": frozen}
        token = exact[:, t].clone()
        found = reference_heads.decode_(
            token, wide(bias), exact_state, rule, layout, wide(steering), *map(wide, turn), **options
        )  # fmt: skip
        exact_reads.append(found[0])
        exact_deltas.append(found[1])
        exact[:, t] = token
        own = tokens[:, t].clone()
        numba_heads.decode_(own, bias, one_by_one, rule, layout, steering, *turn, skipped=counted, **options)
    assert torch.equal(state, one_by_one) and torch.equal(skipped, counted)
    assert_close(state, exact_state)
    assert_close(reads.view(batch, length, -1), torch.stack(exact_reads, 1))
    assert_close(rows.view(packed.shape)[..., : layout.width], exact[..., : layout.width])
    assert (delta is None) == (steering.o is None)
    if delta is not None:
        assert_close(delta.view(batch, length, -1), torch.stack(exact_deltas, 1))


@pytest.fixture
def regions(monkeypatch):
    """How many threads each call of a compiled loop was given, with PyTorch on three; one is not noted."""
    found, start, before = [], numba_heads.on_threads, torch.get_num_threads()
    monkeypatch.setattr(numba_heads, "on_threads", lambda *given: (found.append(given[-1]), start(*given)))
    torch.set_num_threads(3)
    yield found
    torch.set_num_threads(before)


@pytest.mark.skipif(numba_threads._openmp() is None, reason="PyTorch runs on no OpenMP that starts regions")
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    ("batch", "length", "threads"), [(1, 64, []), (3, 5, []), (1, 100, [3]), (1, 400, [3]), (5, 130, [3]), (30, 3, [3])]
)
def test_threads_change_no_bit(regions, batch, length, threads, heads):
    """The threads of a prompt follow one another; which of them computes what is not to be seen."""
    rule, layout = DeltaRule(8, heads), HeadLayout(2, 1, 1, 16, 16)
    packed, steering, *tables = problem(layout, rule.read_width, "qo", True, 0, (batch, length), 1, rule.width, 0)
    bias, mask = torch.zeros(rule.bias_width), torch.rand(batch, length) > 0.1
    packed[0, 2, layout.width] = float("nan")

    def run(frozen):
        rows, state = packed.flatten(0, 1).clone(), torch.ones(batch, heads, 8, 8)
        skipped = torch.zeros(batch, dtype=torch.int32)
        reads, delta = numba_heads.prefill_(
            rows, length, bias, state, rule, layout, steering, *tables, mask=mask, skipped=skipped, frozen=frozen,
            workspace=None,
        )  # fmt: skip
        steered = packed.clone()
        numba_heads.steer_heads_(steered, reads.view(batch, length, -1).nan_to_num(), layout, steering, *tables)
        return rows, reads, delta, state, skipped, steered

    for frozen in (False, True):
        torch.set_num_threads(1)
        alone = run(frozen)
        assert not regions
        torch.set_num_threads(3)
        for _ in range(20):
            for mine, other in zip(run(frozen), alone, strict=True):
                assert torch.equal(mine.nan_to_num(), other.nan_to_num())
        assert regions == 40 * threads  # the prompt and its heads alone
        regions.clear()


def test_a_part_that_failed_is_an_error(monkeypatch, regions):
    """numba prints what is raised on a thread and goes on; here nothing is done at all."""
    monkeypatch.setattr(numba_heads, "on_threads", lambda *given: None)
    rule, layout = DeltaRule(8), HeadLayout(2, 1, 1, 16, 16)
    packed, steering, *tables = problem(layout, 8, "qo", True, 0, (1, 100), 1, rule.width, 0)
    with pytest.raises(MemoryError, match="3 of 3 parts"):
        numba_heads.prefill_(
            packed[0], 100, torch.zeros(8), torch.zeros(1, 1, 8, 8), rule, layout, steering, *tables, mask=None,
            skipped=torch.zeros(1, dtype=torch.int32), frozen=False, workspace=None,
        )  # fmt: skip


def test_the_deltas_of_a_long_prompt_wait_for_the_attention(monkeypatch):
    """Before it they would be a part of its peak memory; behind it they are the same within rounding."""
    model = loud_adapter(patch_model(tiny_model(), DeltaMemConfig(), backend="numba"))
    ids, made = torch.randint(3, 128, (2, 40)), []
    original = numba_heads._steer_rows
    monkeypatch.setattr(numba_heads, "_steer_rows", lambda *given: made.append(original(*given)) or made[-1])
    wanted = model(ids).logits
    monkeypatch.setattr(numba_heads, "MOST_DELTAS", 79)
    found = model(ids).logits
    assert [delta is None for _, delta in made] == len(made) // 2 * [False] + len(made) // 2 * [True] != []
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_without_openmp_there_is_one_thread(monkeypatch, regions):
    monkeypatch.setattr(numba_threads, "_openmp", lambda: None)
    assert numba_threads.threads_for(8) == 1


def test_prefill_leaves_what_it_cannot_take():
    rule, layout = DeltaRule(8), HeadLayout(2, 1, 1, 16, 16)
    packed, steering, *tables = problem(layout, 8, "qo", True, 0, (6,), 1, rule.width, 0)
    tables, options = [torch.randn(1, 3, 16) for _ in tables], {"mask": None, "frozen": False, "workspace": None}
    state, skipped = torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int32)
    for rows, own, count in (
        (packed.bfloat16(), state, skipped),
        (torch.cat([packed, packed], 1)[:, : packed.shape[1]], state, skipped),
        (packed, state.transpose(2, 3), skipped),
        (packed, state, skipped.long()),
    ):
        before, start = rows.clone(), own.clone()
        found = numba_heads.prefill_(
            rows, 3, torch.zeros(8), own, rule, layout, steering, *tables, skipped=count, **options
        )  # fmt: skip
        assert found is None and torch.equal(rows, before) and torch.equal(own, start)


def test_delta_alone():
    make = torch.Generator().manual_seed(0)
    reads, weight, norm = (torch.randn(*shape, generator=make) for shape in ((7, 8), (20, 8), (20,)))
    for norm_weight in (None, norm):
        for lead in ((7,), (7, 1)):
            found = numba_heads.delta(reads.view(*lead, 8), weight, 0.5, torch.float32, norm_weight=norm_weight)
            exact = reference_heads.delta(
                reads.view(*lead, 8).double(), weight, 0.5, torch.float64, norm_weight=norm_weight
            )  # fmt: skip
            assert_close(found, exact)


def test_what_is_prepared_follows_the_weights():
    rule, layout = DeltaRule(8), HeadLayout(2, 1, 1, 16, 16)
    packed, steering, *tables = problem(layout, 8, "qo", True, 0, (2,), 1, rule.width, 0)
    bias, state, prepared = torch.zeros(8), torch.randn(2, 1, 8, 8), {}

    def run(prepared):
        rows = packed.clone()
        _, delta = numba_heads.decode_(
            rows, bias, state.clone(), rule, layout, steering, *tables, workspace=prepared
        )  # fmt: skip
        return rows, delta

    run(prepared)
    steering.q.mul_(2)
    steering.o.data = torch.randn_like(steering.o)
    tables[0].add_(1)
    bias.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(run(prepared), run(None)))
    narrow = [packed.bfloat16(), *(t.bfloat16() for t in tables)]
    other = narrow[0].clone()
    numba_heads.decode_(narrow[0], bias, state.clone(), rule, layout, steering, *narrow[1:])
    reference_heads.decode_(other, bias, state.clone(), rule, layout, steering, *narrow[1:])
    assert torch.equal(narrow[0], other)


@pytest.mark.parametrize("module", (reference_heads, numba_heads), ids=("reference", "numba"))
def test_errors_name_the_argument(module):
    rule, layout = DeltaRule(8), HeadLayout(2, 1, 1, 16, 16)
    packed, steering, cos, sin = problem(layout, 8, "qo", True, 4, (2,), 1, rule.width, 0)
    bias, state = torch.zeros(8), torch.zeros(2, 1, 8, 8)
    good = {"packed": packed, "layout": layout, "steering": steering, "cos": cos, "sin": sin, "state": state}
    wrong = [
        ({"packed": packed[:, :-1]}, r"packed: got shape \[2, 95\]"),
        ({"cos": None}, "cos, sin: allowed both"),
        ({"sin": sin[..., :8]}, r"sin: got shape \[1, 1, 8\]"),
        ({"steering": steering._replace(q=steering.q[:, :4])}, r"q: got shape \[32, 4\], allowed \[32, 8\]"),
        ({"steering": steering._replace(k_norm=cos[0, 0, :3])}, r"k_norm: got shape \[3\], allowed \[16\]"),
        ({"steering": steering._replace(scale_raw=torch.zeros(2))}, r"scale_raw: got shape \[2\]"),
        ({"state": state[:1]}, "state: got 1 rows"),
    ]
    for change, message in wrong:
        given = good | change
        before = [t.clone() for t in (given["packed"], state)]
        with pytest.raises(ValueError, match=message):
            module.decode_(given["packed"], bias, given["state"], rule, given["layout"], given["steering"],
                           given["cos"], given["sin"])  # fmt: skip
        assert torch.equal(before[0], given["packed"]) and torch.equal(before[1], state)
    for arguments, message in (((1, 1, 1, 3), "dim: got 3"), ((0, 1, 1, 4), "q: got 0"), ((1, 1, 1, 4, 6), "rotary")):
        with pytest.raises(ValueError, match=message):
            HeadLayout(*arguments)


def test_a_step_and_its_steering_are_the_generic_operations():
    """decode_ = step, then steer on q: what the generic path computes."""
    rule, layout = DeltaRule(8), HeadLayout(2, 1, 1, 16)
    packed, steering, _, _ = problem(layout, 8, "qo", False, 0, (3,), 1, rule.width, 5)
    bias, state = torch.zeros(8), torch.randn(3, 1, 8, 8)
    stepped, q = state.clone(), packed[:, :32].clone()
    reads = reference.step(packed[:, layout.width :], bias, stepped, rule)
    found, delta = numba_heads.decode_(packed, bias, state, rule, layout, steering)
    assert_close(found, reads.double())
    assert_close(state, stepped.double())
    assert_close(packed[:, :32], reference.steer(q, reads, steering.q, steering.scale).double())
    assert_close(delta, reference.steer(torch.zeros(3, 20), reads, steering.o, steering.scale).double())
