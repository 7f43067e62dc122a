"""What must hold of the kernels, on any device: the interpreter and a GPU run the same checks."""

from __future__ import annotations

import torch
from raw_keys import RAW

from deltamem_kernels.reference import recurrence as reference
from deltamem_kernels.rule import DeltaRule
from deltamem_kernels.triton import scan as kernel
from deltamem_kernels.triton.read import read
from deltamem_kernels.triton.read_backward import read_backward
from deltamem_kernels.triton.scan_backward import scan_backward
from deltamem_kernels.triton.steer_backward import steer_backward
from deltamem_kernels.triton.step import step

EPS32 = torch.finfo(torch.float32).eps


def poisoned(*shape, dtype=None, device=None):
    """Stands in for ``torch.empty`` in the launchers: an element that no kernel writes is seen."""
    value = float("nan") if dtype.is_floating_point else 101
    return torch.full(*shape, value, dtype=dtype, device=device)


def random_problem(rule: DeltaRule, batch, length, dtype=torch.float32, device="cpu", seed=0, masked=False):
    """projections, gate_bias, state, mask (or None), fresh and random."""
    make = torch.Generator().manual_seed(seed)
    # Sizes from far below to well above 1: tanh is tried where it is linear and where it is flat.
    sizes = torch.exp(torch.randn(batch, length, 1, generator=make))
    if not rule.normalize:
        sizes = sizes.clamp(max=2.0) * RAW
    x = (torch.randn(batch, length, rule.width, generator=make) * sizes).to(dtype)
    bias = torch.randn(rule.bias_width, generator=make) - 1.0
    state = torch.randn(batch, rule.heads, rule.rank, rule.rank, generator=make)
    mask = torch.rand(batch, length, generator=make) > 0.3 if masked else None
    return tuple(t.to(device) if t is not None else None for t in (x, bias, state, mask))


def assert_budget(actual, float32, oracle, what: str, factor: float = 4.0):
    """The error against a float64 oracle is at most a few times that of plain float32, plus rounding; of a 16-bit
    result also a unit in its last place (the interpreter cuts bfloat16 off where a GPU rounds)."""
    place = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    actual, float32, oracle = (t.detach().double().cpu() for t in (actual, float32, oracle))
    assert actual.shape == oracle.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return
    error = ((actual - oracle).abs() - place * oracle.abs()).max().item()
    budget = factor * (float32 - oracle).abs().max().item() + 16 * EPS32 * max(1.0, oracle.abs().max().item())
    assert error <= budget, f"{what}: error {error:.3g}, allowed {budget:.3g}"  # False for NaN


def on_cpu(arguments: dict) -> dict:
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def check_scan(rule, x, bias, state, chunk=None, **arguments):
    """scan against the reference."""
    actual = kernel.scan(x, bias, state, rule, chunk=chunk, **arguments)
    given = (x.cpu(), bias.cpu(), None if state is None else state.cpu(), rule)
    plain = reference.scan(*given, **on_cpu(arguments))
    oracle = reference.scan(*given, **on_cpu(arguments), dtype=torch.float64)
    for name in ("reads", "state"):
        assert_budget(getattr(actual, name), getattr(plain, name), getattr(oracle, name), name)
    assert actual.skipped.tolist() == oracle.skipped.tolist()
    assert actual.skipped.dtype == torch.int32
    assert (actual.checkpoints is None) == (oracle.checkpoints is None)
    if oracle.checkpoints is not None:
        assert_budget(actual.checkpoints, plain.checkpoints, oracle.checkpoints, "checkpoints")
    return actual


def check_read(rule, x, state, **arguments):
    actual = read(x, state, rule, **arguments)
    plain = reference.read(x.cpu(), state.cpu(), rule, **on_cpu(arguments))
    oracle = reference.read(x.cpu(), state.cpu(), rule, **on_cpu(arguments), dtype=torch.float64)
    assert_budget(actual, plain, oracle, "reads")


def check_split(rule, x, bias, state, mask, cut, chunk=None):
    """Any split of a sequence with the state carried = the whole."""
    whole = kernel.scan(x, bias, state, rule, mask=mask, chunk=chunk)
    first, second = (slice(None, cut), slice(cut, None))
    masks = [None if mask is None else mask[:, part] for part in (first, second)]
    one = kernel.scan(x[:, first], bias, state, rule, mask=masks[0], chunk=chunk)
    two = kernel.scan(x[:, second], bias, one.state, rule, mask=masks[1], chunk=chunk)
    plain = reference.scan(*(t.cpu() for t in (x, bias, state)), rule, mask=None if mask is None else mask.cpu())
    size = max(1.0, plain.reads.abs().max().item() if plain.reads.numel() else 1.0)
    error = (torch.cat([one.reads, two.reads], 1) - whole.reads).abs()
    assert error.numel() == 0 or error.max().item() <= 64 * EPS32 * size
    assert (two.state - whole.state).abs().max().item() <= 64 * EPS32 * max(1.0, plain.state.abs().max().item())
    assert torch.equal(one.skipped + two.skipped, whole.skipped)
    if chunk == 0:
        assert torch.equal(two.state, whole.state)


def check_masked_tail(rule, x, bias, state, kept, chunk):
    """Masked tokens at the end = no tokens there, to the bit; they read 0."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[:, kept:] = False
    masked = kernel.scan(x, bias, state, rule, mask=mask, chunk=chunk)
    removed = kernel.scan(x[:, :kept], bias, state, rule, chunk=chunk)
    assert torch.equal(masked.state, removed.state)
    assert torch.equal(masked.reads[:, :kept], removed.reads)
    assert not masked.reads[:, kept:].any()


def check_masked_inside(rule, x, bias, state, mask):
    """One chunk: a masked token = a removed token, to the bit."""
    masked = kernel.scan(x, bias, state, rule, mask=mask, chunk=0)
    for b in range(x.shape[0]):
        kept = x[b : b + 1, mask[b]]
        removed = kernel.scan(kept, bias, state[b : b + 1], rule, chunk=0)
        assert torch.equal(masked.state[b : b + 1], removed.state)
        assert torch.equal(masked.reads[b : b + 1, mask[b]], removed.reads)
    assert not masked.reads[~mask].any()


def check_closed_gate(rule, x, bias, state, chunk):
    """β = 0: nothing is written; what is left is decay, which is none if λ = 1 − β or 1 and no guard holds it."""
    closed = bias.clone()
    closed[: rule.gate_width] = -1e4
    out = kernel.scan(x, closed, state, rule, chunk=chunk)
    if rule.has_lambda or rule.keep_max < 1:
        keep = x.new_ones((*x.shape[:2], rule.gate_width), dtype=torch.float64)
        if rule.has_lambda:
            keep = torch.sigmoid(x[..., -rule.gate_width :].double() + bias[rule.gate_width :].double())
        keep = keep.clamp(max=rule.keep_max).prod(1).reshape(x.shape[0], rule.heads, -1, 1)
        assert (out.state - keep * state).abs().max().item() <= 64 * EPS32 * state.abs().max().item()
    else:
        assert torch.equal(out.state, state)


def check_rows_permute(rule, x, bias, state, mask, chunk):
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(1)).to(x.device)
    straight = kernel.scan(x, bias, state, rule, mask=mask, chunk=chunk)
    turned = kernel.scan(x[order], bias, state[order], rule, mask=mask[order], chunk=chunk)
    assert torch.equal(straight.reads[order], turned.reads)
    assert torch.equal(straight.state[order], turned.state)
    assert torch.equal(straight.skipped[order], turned.skipped)


def strided_copies(x: torch.Tensor):
    """The same numbers in other memory: a slice of wider rows, every second number, and time first."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), float("nan"))
    wide[..., 3:-2] = x
    sparse = x.new_full((*x.shape, 2), float("nan"))
    sparse[..., 0] = x
    turned = x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x.t().contiguous().t()
    return wide[..., 3:-2], sparse[..., 0], turned


def check_strides(rule, x, bias, state, mask, chunk):
    """Where the numbers lie makes no difference, to the bit."""
    plain = kernel.scan(x, bias, state, rule, mask=mask, chunk=chunk)
    far = state.transpose(2, 3).contiguous().transpose(2, 3)
    wide_mask = torch.stack([mask, ~mask], -1)[..., 0]
    for copy in strided_copies(x):
        out = kernel.scan(copy, bias, far, rule, mask=wide_mask, chunk=chunk)
        assert torch.equal(out.reads, plain.reads) and torch.equal(out.state, plain.state)
    straight, reads = state.clone(), step(x[:, 0], bias, (first := state.clone()), rule, mask=mask[:, 0])
    for copy in strided_copies(x[:, 0].contiguous()):
        there = straight.transpose(2, 3).clone(memory_format=torch.contiguous_format).transpose(2, 3)
        assert torch.equal(step(copy, bias, there, rule, mask=wide_mask[:, 0]), reads)
        assert torch.equal(there, first)


def check_recall(rank: int, normalize: bool, chunk, device="cpu"):
    """Orthonormal keys at β = 1: every value comes back exactly, once written."""
    rule = DeltaRule(rank, mode="no_lambda", normalize=normalize)
    keys = torch.eye(rank) * (40.0 if normalize else 1.0)
    values = torch.randn(rank, rank, generator=torch.Generator().manual_seed(3))
    write = torch.cat([torch.zeros(rank, rank), keys, values, torch.full((rank, rank), 1e4)], 1)
    ask = torch.cat([keys, torch.zeros(rank, 2 * rank), torch.full((rank, rank), -1e4)], 1)
    x = torch.cat([write, ask])[None].to(device)
    out = kernel.scan(x, torch.zeros(rank, device=device), None, rule, chunk=chunk)
    found = out.reads[0, rank:].cpu()
    if normalize and device != "cpu":
        assert (found - values).abs().max().item() <= 4 * EPS32 * values.abs().max().item()
    else:
        assert torch.equal(found, values)
    assert not out.reads[0, :rank].any()


def check_not_finite(rule, x, bias, state, chunk):
    """A token with one NaN or Inf anywhere = a masked token, and is counted, unless it is masked anyway."""
    batch, length, width = x.shape
    bad, mask = x.clone(), torch.ones(batch, length, dtype=torch.bool, device=x.device)
    places = [(0, 0, 0, "nan"), (0, length - 1, width - 1, "inf"), (batch - 1, length // 2, width // 2, "-inf")]
    for b, t, w, value in places:
        bad[b, t, w] = float(value)
    bad[batch - 1, length - 1, 1] = float("nan")
    mask[batch - 1, length - 1] = False
    out = check_scan(rule, bad, bias, state, chunk=chunk, mask=mask)
    assert out.skipped.sum().item() == len({place[:2] for place in places} - {(batch - 1, length - 1)})
    as_masked = mask.clone()
    for b, t, _, _ in places:
        as_masked[b, t] = False
    expected = kernel.scan(x, bias, state, rule, mask=as_masked, chunk=chunk)
    assert torch.equal(out.state, expected.state) and torch.equal(out.reads, expected.reads)
    assert not out.reads[~as_masked].any()
    check_read(rule, bad, state, mask=mask)


def check_packed(rule, x, bias, state, mask, lengths, chunk, every=0, slots=None):
    """Packed sequences = each on its own, to the bit when cut into the same chunks."""
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    assert x.shape[:2] == (1, bounds[-1])
    cu = torch.tensor(bounds, dtype=torch.int32, device=x.device)
    out = check_scan(rule, x, bias, state, chunk=chunk, mask=mask, cu_seqlens=cu, slots=slots, checkpoint_every=every)
    rows = state if slots is None else [state[s] if s >= 0 else torch.zeros_like(state[0]) for s in slots.tolist()]
    for i in range(len(lengths)):
        if slots is not None and slots[i] < 0:
            assert not out.reads[:, bounds[i] : bounds[i + 1]].any() and not out.state[i].any()
            continue
        part = slice(bounds[i], bounds[i + 1])
        one = kernel.scan(
            x[:, part], bias, rows[i][None], rule, mask=None if mask is None else mask[:, part], chunk=chunk
        )
        assert torch.equal(out.reads[:, part], one.reads) and torch.equal(out.state[i], one.state[0])
        assert out.skipped[i] == one.skipped[0]


def check_step(rule, x, bias, state, mask, slots=None):
    """T steps = the reference; each step = a scan of one token."""
    at, skipped = state.clone(), torch.zeros(state.shape[0], dtype=torch.int32, device=x.device)
    plain, oracle = state.cpu().clone(), state.cpu().double()
    counted = skipped.cpu().clone()
    for t in range(x.shape[1]):
        valid = None if mask is None else mask[:, t]
        before = at.clone()
        reads = step(x[:, t], bias, at, rule, mask=valid, slots=slots, skipped=skipped)
        given = {"mask": None if valid is None else valid.cpu(), "slots": None if slots is None else slots.cpu()}
        plain_reads = reference.step(x[:, t].cpu(), bias.cpu(), plain, rule, skipped=counted, **given)
        oracle_reads = reference.step(x[:, t].cpu(), bias.cpu(), oracle, rule, **given)
        assert_budget(reads, plain_reads, oracle_reads, f"reads of step {t}")
        assert_budget(at, plain, oracle, f"state of step {t}")
        assert skipped.tolist() == counted.tolist()
        if slots is None:
            one = kernel.scan(
                x[:, t : t + 1], bias, before, rule, mask=None if mask is None else mask[:, t : t + 1], chunk=0
            )
            assert_budget(at, plain, one.state, "step against scan", 16)
            if valid is not None:
                assert torch.equal(at[~valid], before[~valid])
        else:
            untouched = [s for s in range(state.shape[0]) if s not in slots.tolist()]
            assert torch.equal(at[untouched], before[untouched])


def all_steps(rule, x, bias, state, mask):
    """Reads [B, T, H·r] and the last state, token after token."""
    at = state.clone()
    reads = [step(x[:, t], bias, at, rule, mask=None if mask is None else mask[:, t]) for t in range(x.shape[1])]
    return torch.stack(reads, 1), at


def check_steer(base, reads, weight, scale, norm_weight=None):
    from deltamem_kernels.triton.steer import steer

    given = [t.cpu() if t is not None else None for t in (base, reads, weight)]
    norm = None if norm_weight is None else norm_weight.cpu()
    wide = given[0].double(), given[1].double(), given[2].double()
    oracle = reference.steer(*wide, scale, norm_weight=None if norm is None else norm.double())
    plain = reference.steer(given[0].float(), *given[1:], scale, norm_weight=norm)
    actual = steer(base, reads, weight, scale, norm_weight=norm_weight)
    assert actual.dtype == base.dtype and actual.shape == base.shape
    rounding = torch.finfo(base.dtype).eps * max(1.0, oracle.abs().max().item()) if oracle.numel() else 0.0
    budget = rounding + 8 * (plain.double() - oracle).abs().sum().clamp(max=1e-3).item()
    error = (actual.double().cpu() - oracle).abs()
    assert error.numel() == 0 or error.max().item() <= budget
    in_place = base.clone(memory_format=torch.preserve_format)
    assert steer(in_place, reads, weight, scale, norm_weight=norm_weight, out=in_place) is in_place
    assert torch.equal(in_place, actual)


def gradients(function, inputs, weights, dtype):
    """Gradients, by autograd, of a weighted sum of the outputs of ``function``; None where there is no input."""
    leaves = [None if t is None else t.detach().cpu().to(dtype).requires_grad_() for t in inputs]
    outputs = [o for o in function(*leaves, dtype) if o is not None]
    total = sum((o * w.cpu().to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))
    found = iter(torch.autograd.grad(total, [t for t in leaves if t is not None], materialize_grads=True))
    return [None if t is None else next(found) for t in leaves]


def random_like(shapes, device, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=make).to(device) for shape in shapes]


def assert_gradients(actual, plain, exact, inputs, what):
    for name, a, p, e, given in zip(what, actual, plain, exact, inputs, strict=True):
        assert (a is None) == (given is None)
        if a is not None:
            assert a.dtype == given.dtype and a.shape == given.shape
            assert_budget(a, p, e, f"gradient of {name}", 8)


def scan_weights(rule, x, sequences, every, packed, seed=0):
    """Random gradients of reads, state and checkpoints (or None)."""
    batch, length = x.shape[:2]
    shape = (rule.heads, rule.rank, rule.rank)
    lead = (length // every,) if packed and every else (batch, length // every) if every else None
    shapes = [(batch, length, rule.read_width), (sequences, *shape)] + ([(*lead, *shape)] if every else [])
    found = random_like(shapes, x.device, seed)
    return found if every else [*found, None]


def scan_gradients(rule, x, bias, state, chunk=None, spacing=None, checkpoint_every=0, **arguments):
    """scan_backward of random gradients, those gradients first."""
    cu = arguments.get("cu_seqlens")
    sequences = x.shape[0] if cu is None else cu.numel() - 1
    weights = scan_weights(rule, x, sequences, checkpoint_every, cu is not None)
    found = scan_backward(
        weights[0], weights[1], x, bias, state, rule, **arguments,
        d_checkpoints=weights[2], checkpoint_every=checkpoint_every, chunk=chunk, spacing=spacing,
    )  # fmt: skip
    return weights, found


def check_scan_gradient(rule, x, bias, state, chunk=None, spacing=None, checkpoint_every=0, **arguments):
    """scan_backward against autograd of the reference."""
    weights, actual = scan_gradients(rule, x, bias, state, chunk, spacing, checkpoint_every, **arguments)
    weights = [w for w in weights if w is not None]

    def function(x, bias, state, dtype):
        out = reference.scan(
            x, bias, state, rule, **on_cpu(arguments), checkpoint_every=checkpoint_every, dtype=dtype
        )  # fmt: skip
        return out.reads, out.state, out.checkpoints

    inputs = (x, bias, state)
    plain, exact = (gradients(function, inputs, weights, dtype) for dtype in (torch.float32, torch.float64))
    assert_gradients(actual, plain, exact, inputs, ("projections", "gate_bias", "state"))
    return actual


def long_gradient(rule, x, bias, state, weights, mask, piece=512):
    """Gradients in float64 of a sequence too long to differentiate at once: piece after piece, from the end."""
    x, bias, state, mask = (t.detach().cpu() for t in (x, bias, state, mask))
    d_reads, d_after = (w.cpu().double() for w in weights[:2])
    cuts = range(0, x.shape[1], piece)
    states = [state.double()]
    with torch.no_grad():
        for t in cuts:
            part = slice(t, t + piece)
            states.append(
                reference.scan(x[:, part], bias, states[-1], rule, mask=mask[:, part], dtype=torch.float64).state
            )
    d_x, d_bias = [], torch.zeros_like(bias, dtype=torch.float64)
    for t, before in zip(reversed(cuts), reversed(states[:-1])):
        part = slice(t, t + piece)
        leaves = [leaf.double().requires_grad_() for leaf in (x[:, part], bias, before)]
        out = reference.scan(*leaves, rule, mask=mask[:, part], dtype=torch.float64)
        found = torch.autograd.grad((out.reads, out.state), leaves, (d_reads[:, part], d_after))
        d_x.insert(0, found[0])
        d_bias, d_after = d_bias + found[1], found[2]
    return torch.cat(d_x, 1), d_bias, d_after


def check_read_gradient(rule, x, state, **arguments):
    (weight,) = random_like([(*x.shape[:2], rule.read_width)], x.device)
    actual = read_backward(weight, x, state, rule, **arguments)

    def function(x, state, dtype):
        return (reference.read(x, state, rule, **on_cpu(arguments), dtype=dtype),)

    plain, exact = (gradients(function, (x, state), [weight], dtype) for dtype in (torch.float32, torch.float64))
    assert_gradients(actual, plain, exact, (x, state), ("projections", "state"))


def check_steer_gradient(grad, reads, weight, scale, norm_weight=None):
    inputs = reads, weight, norm_weight
    actual = steer_backward(grad, reads, weight, scale, norm_weight=norm_weight)

    def function(reads, weight, norm_weight, dtype):
        base = torch.zeros(grad.shape, dtype=dtype)
        return (reference.steer(base, reads, weight, scale, norm_weight=norm_weight),)

    plain, exact = (gradients(function, inputs, [grad], dtype) for dtype in (torch.float32, torch.float64))
    assert_gradients(actual, plain, exact, inputs, ("reads", "weight", "norm_weight"))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)


def check_gradient_bits(rule, x, bias, state, mask, chunk=None, spacing=None):
    """The same bits on every run, in any order of the rows, and wherever the numbers lie."""
    weights, found = scan_gradients(rule, x, bias, state, chunk, spacing, mask=mask)
    assert equal(scan_gradients(rule, x, bias, state, chunk, spacing, mask=mask)[1], found)
    how = {"chunk": chunk, "spacing": spacing}
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(1)).to(x.device)
    turned = scan_backward(
        *(w[order] for w in weights[:2]), x[order], bias, state[order], rule, mask=mask[order], **how
    )  # fmt: skip
    assert torch.equal(turned[0], found[0][order]) and torch.equal(turned[2], found[2][order])
    far = state.transpose(2, 3).contiguous().transpose(2, 3)
    d_reads, d_state = weights[0].transpose(0, 1).contiguous().transpose(0, 1), weights[1].mT.contiguous().mT
    for copy in strided_copies(x):
        assert equal(scan_backward(d_reads, d_state, copy, bias, far, rule, mask=mask, **how), found)


def check_masked_gradient(rule, x, bias, state, mask, spacing=None):
    """One chunk: a masked token gets 0, and the others, as the state, what they get without it, to the bit."""
    (d_reads, d_state, _), (d_x, _, d_initial) = scan_gradients(rule, x, bias, state, 0, spacing, mask=mask)
    assert not d_x[~mask].any()
    for b in range(x.shape[0]):
        kept, row = mask[b], slice(b, b + 1)
        one = scan_backward(
            d_reads[row, kept], d_state[row], x[row, kept], bias, state[row], rule, chunk=0, spacing=spacing
        )  # fmt: skip
        assert torch.equal(one[0], d_x[row, kept]) and torch.equal(one[2], d_initial[row])


def check_not_finite_gradient(rule, x, bias, state, chunk=None, spacing=None):
    """A token that is not finite gets 0 and takes its gradient with it, whatever that is."""
    bad, mask = x.clone(), torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    bad[0, 0, 0], bad[-1, x.shape[1] // 2, -1] = float("nan"), float("inf")
    mask[0, 0] = mask[-1, x.shape[1] // 2] = False
    (d_reads, d_state, _), expected = scan_gradients(rule, x, bias, state, chunk, spacing, mask=mask)
    d_reads = torch.where(mask.unsqueeze(-1), d_reads, float("nan"))
    found = scan_backward(d_reads, d_state, bad, bias, state, rule, chunk=chunk, spacing=spacing)
    assert equal(found, expected) and not found[0][~mask].any()


def check_packed_gradient(rule, x, bias, pool, lengths, slots=None, chunk=None, spacing=None, **arguments):
    """Packed sequences against the reference, and each as it is on its own, to the bit."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    cu = bounds.int().to(x.device)
    how = {"chunk": chunk, "spacing": spacing}
    d_x, _, _ = check_scan_gradient(rule, x, bias, pool, cu_seqlens=cu, slots=slots, **how, **arguments)
    if arguments.get("checkpoint_every"):
        return
    weights = scan_weights(rule, x, len(lengths), 0, True)
    rows = pool if slots is None else pool[slots.clamp(min=0).long()]
    for i, (first, last) in enumerate(zip(bounds.tolist(), bounds[1:].tolist())):
        if slots is not None and slots[i] < 0:
            assert not d_x[:, first:last].any()
            continue
        one = scan_backward(
            weights[0][:, first:last], weights[1][i : i + 1], x[:, first:last], bias, rows[i : i + 1], rule, **how
        )  # fmt: skip
        assert torch.equal(one[0], d_x[:, first:last])
