"""A sequence of tokens through the delta rule.

    read_t = S_{t-1} q_t
    S_t    = diag(keep_t) S_{t-1} − diag(erase_t) (S_{t-1} k_t) k_tᵀ + diag(write_t) v_t k_tᵀ

Row i of S goes through an affine map per token, s_i <- s_i (keep_i I − erase_i k kᵀ) + write_i v_i kᵀ, and affine
maps compose. A long sequence is therefore cut into chunks (``chunk_scan``):

    1. ``chunk_transition_kernel``: the map of each chunk, a matrix [r, r] and a vector [r] per row, all chunks at once;
    2. ``state_passing_kernel``: the state before each chunk, one chunk after another, T / C short steps;
    3. ``chunk_scan_kernel``: the reads of each chunk from the state before it, all chunks at once.

A short sequence, or a rank above 16, is one chunk: kernel 3 alone. Beforehand ``token_parts_kernel`` says which tokens
count, one byte each, and what every step wants of its token; for autograd, and for very many tokens,
``token_flags_kernel`` says the first alone, and the steps see to the second.

A token that would leave NaN or Inf in the state of any head is written in none. No kernel of these looks at every
state: what is not finite stays so (Inf times a number, plus a number, is Inf or NaN), so the last ones tell of all.
Where one is not finite, ``repair_kernel`` takes the sequence once more, token by token, all heads at once.
"""

from __future__ import annotations

import math

import torch
import triton

from ..errors import ArgumentError
from ..rule import DeltaRule, ScanOutput
from .chunk_scan import chunk_scan_kernel, chunk_transition_kernel, state_passing_kernel
from .launch import (
    bytes_and_slots,
    check_tokens,
    launch,
    next_power_of_two,
    rule_flags,
    state_strides,
    strides,
    tile,
)
from .repair import repair_kernel
from .replay import allocate, replayed
from .token_parts import find_flags, find_parts, worth_preparing

SHORT = 64  # tokens up to which one launch beats three
CHUNKED_RANK = 16  # a chunk's transition has r³ numbers; above this rank they outweigh the tokens
TRANSITION_WARPS = 2  # of its program: r (r + 1) columns a head look at the same tokens, which then lie in L1


def choose_chunk(rule: DeltaRule, length: int) -> int:
    """Tokens per chunk, or 0 for one chunk a sequence.

    2 C steps over tokens and T / C over chunks, one of which takes a quarter of the time (on an H100), are quickest at
    C = √(T / 8). The transitions, 4 r² (r + 1) bytes a chunk and head, are to weigh no more than twice the tokens, 8 r
    C bytes, and in a long sequence less: C = r (r + 1) / 4 or more, and √(T / 4).

    (``round`` takes a half to the even side: 64 at T = 8,192 and 32,768.) It depends on nothing that changes from call
    to call but T: a row's bits depend neither on the rows beside it nor on whether a gradient is wanted.
    """
    shortest = max(16, next_power_of_two(rule.rank * (rule.rank + 1) // 4))
    if length <= max(SHORT, shortest) or rule.rank > CHUNKED_RANK:
        return 0
    return max(shortest, 1 << round(math.log2(length / 4) / 2))


def depth(rule: DeltaRule, length: int) -> int:
    """Dependent steps of a scan: T in one chunk, else C (transitions), T / C (states) and C (reads)."""
    chunk = choose_chunk(rule, length)
    return 2 * chunk + triton.cdiv(length, chunk) if chunk else length


def chunk_table(cu_seqlens: torch.Tensor, length: int, chunk: int):
    """Packed sequences → (sequence of each chunk, −1 past the last; first chunk of each sequence, then the total).

    T // C + N chunks are always enough, so the host need not know how many there are.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).clamp(min=0)
    sequences = lengths.numel()
    if not chunk:
        first = torch.arange(sequences + 1, dtype=torch.int32, device=cu_seqlens.device)
        return first[:-1], first
    first = torch.zeros(sequences + 1, dtype=torch.int32, device=cu_seqlens.device)
    torch.cumsum((lengths + chunk - 1) // chunk, 0, dtype=torch.int32, out=first[1:])
    most = length // chunk + sequences
    first.clamp_(max=most)  # starts past T are wrong and not seen: still, nothing is written past the chunks
    chunks = torch.arange(most, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(first[1:], chunks, right=True, out_int32=True)
    return torch.where(sequence < sequences, sequence, -1), first


def cut(cu_seqlens: torch.Tensor | None, sequences: int, length: int, chunk: int):
    """Chunks (of packed sequences an upper bound), chunks a sequence (or 0), and the ``chunk_table`` of packed ones."""
    if cu_seqlens is not None:
        sequence, first = chunk_table(cu_seqlens, length, chunk)
        return sequence.numel(), 0, sequence, first
    chunks = triton.cdiv(length, chunk) if chunk else 1
    return sequences * chunks, chunks, None, None


def first_checkpoints(cu_seqlens: torch.Tensor | None, every: int) -> torch.Tensor | None:
    """Which checkpoint is the first of each packed sequence, int64 [N]; None without checkpoints, or of equal rows."""
    if cu_seqlens is None or not every:
        return None
    taken = (cu_seqlens[1:] - cu_seqlens[:-1]) // every
    return taken.cumsum(0, dtype=torch.int64) - taken


def scan(
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    chunk: int | None = None,
) -> ScanOutput:
    """Read and write a sequence of tokens.

        read_t = S_{t-1} q_t
        S_t    = diag(keep_t) S_{t-1} − diag(erase_t) (S_{t-1} k_t) k_tᵀ + diag(write_t) v_t k_tᵀ

    Args:
        projections: bfloat16, float16 or float32 [B, T, W], raw, of any strides; or [1, T, W] packed, with
            ``cu_seqlens``.
        gate_bias: [β's (and λ's) biases], of any floating dtype.
        state: float32 [N, H, r, r] before the first token, of any strides, or None for zeros. With ``slots``:
            [S, H, r, r]. Not changed.
        rule: the recurrence.
        mask: bool [B, T], True = a real token. A masked token reads 0 and leaves the state bit-equal; so does
            a token with a value that is not finite, and one that would leave NaN or Inf in the state of any head.
        cu_seqlens: int [N + 1] on the device, where each packed sequence starts, then the total; non-decreasing
            from 0 to T, which is not checked (the host would have to wait). A token of no sequence reads 0.
        slots: int [N], which row of ``state`` each sequence starts from; −1 = neither read nor written.
        checkpoint_every: n > 0 also returns the state after every n-th token of each sequence.
        chunk: tokens per chunk, 0 for one chunk a sequence, None to choose (tests set it).

    Returns:
        ScanOutput, all float32 but ``skipped``. A sequence whose slot is −1 has reads and state 0.

    Raises:
        ValueError, TypeError: see ``check_arguments``; a float64 input; tensors that are not on a GPU.
    """
    return scan_with_flags(
        projections, gate_bias, state, rule, mask=mask, cu_seqlens=cu_seqlens, slots=slots,
        checkpoint_every=checkpoint_every, chunk=chunk, says=False,
    )[0]  # fmt: skip


def scan_with_flags(
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    chunk: int | None = None,
    says: bool = True,
) -> tuple[ScanOutput, torch.Tensor | None]:
    """``scan``, and if it ``says`` so the tokens' flags, uint8 [B, T], as ``scan_backward`` takes them.

    1: the token was written. 2: it was not, because it or the state after it is not finite. 0: it is masked.
    """
    check_tokens(
        projections, gate_bias, state, rule,
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    batch, length, _ = projections.shape
    # A scan that says what its tokens are is one for autograd, where memory counts for more.
    is_prepared = not says and projections.numel() > 0 and worth_preparing(rule, batch * length)
    if chunk is None:
        chunk = choose_chunk(rule, length)
    if projections.numel() == 0:
        chunk = 0
    if chunk and rule.rank > CHUNKED_RANK:
        raise ArgumentError(f"chunk: got {chunk} at rank {rule.rank}, allowed 0 above rank {CHUNKED_RANK}")
    mask, slots = bytes_and_slots(mask, slots)
    if cu_seqlens is not None:
        found = _scan(projections, gate_bias, state, mask, slots, cu_seqlens.contiguous(), rule, checkpoint_every,
                      chunk, says, is_prepared)  # fmt: skip
    else:
        inputs = projections, gate_bias, state, mask, slots, None
        found = replayed(_scan, inputs, rule, checkpoint_every, chunk, says, is_prepared)
    return ScanOutput(*found[:4]), found[4]


def _scan(
    projections, gate_bias, state, mask, slots, cu_seqlens,
    rule: DeltaRule, every: int, chunk: int, says: bool, is_prepared: bool,
):  # fmt: skip
    """``scan_with_flags`` of what has been checked → reads, state, skipped, checkpoints, flags."""
    batch, length, width = projections.shape
    heads, rank = rule.heads, rule.rank
    device, packed = projections.device, cu_seqlens is not None
    sequences = cu_seqlens.numel() - 1 if packed else batch
    states = 0 if state is None else state.shape[0]

    # Tokens outside of every packed sequence, and checkpoints past the last, are written by no kernel.
    reads = allocate((batch, length, heads * rank), torch.float32, device, zeros=packed)
    final = allocate((sequences, heads, rank, rank), torch.float32, device)
    checkpoints = None
    if every:
        shape = (length // every,) if packed else (batch, length // every)
        checkpoints = allocate((*shape, heads, rank, rank), torch.float32, device, zeros=packed)
    skipped = allocate((sequences,), torch.int32, device, zeros=bool(chunk))
    if is_prepared:
        x, flags = find_parts(projections, gate_bias, mask, rule)
    else:
        x, flags = projections, find_flags(projections, mask)
    if sequences == 0:
        return reads, final, skipped, checkpoints, flags

    chunks, chunks_per_sequence, chunk_sequence, chunk_first = cut(cu_seqlens, sequences, length, chunk)
    checkpoint_first = first_checkpoints(cu_seqlens, every)
    place = {"length": length, "chunk_length": chunk or length, "chunks_per_sequence": chunks_per_sequence}
    place |= {"cu_ptr": cu_seqlens, "chunk_sequence_ptr": chunk_sequence, "chunk_first_ptr": chunk_first}

    rows, cols = tile(rule)
    raw = strides("x", "btw", projections) | {"stride_bias": gate_bias.stride(0)}
    tokens = {"x_ptr": x, "bias_ptr": gate_bias, "flags_ptr": flags, "PREPARED": is_prepared}
    tokens |= raw | rule_flags(rule, projections)
    if is_prepared:  # no kernel is compiled for what is not read
        tokens |= {"bias_ptr": x, "WHOLE": False, **dict.fromkeys(raw, 1)}
    start = state
    if chunk:
        start = allocate((chunks, heads, rank, rank), torch.float32, device)
        transitions = allocate((chunks, heads, rank, rank + 1, rank), torch.float32, device)
        launch(
            chunk_transition_kernel, triton.cdiv(chunks * heads * rank * (rank + 1), TRANSITION_WARPS * cols),
            projections, num_warps=TRANSITION_WARPS,
            transitions_ptr=transitions, total_groups=chunks * heads, COLUMNS=TRANSITION_WARPS * cols,
            IS_PACKED=packed, **tokens, **place,
        )  # fmt: skip
        launch(
            state_passing_kernel, sequences * heads * rank, projections, num_warps=1,
            transitions_ptr=transitions, s_ptr=state, slots_ptr=slots, starts_ptr=start, final_ptr=final,
            chunk_first_ptr=chunk_first, chunks_per_sequence=chunks_per_sequence, states=states,
            stride_m_a=rank, stride_m_j=1, **state_strides(state), HEADS=heads, RANK=rank, R=rows,
            HAS_STATE=state is not None, HAS_SLOTS=slots is not None, IS_PACKED=packed,
        )  # fmt: skip
    launch(
        chunk_scan_kernel, triton.cdiv(chunks * heads * rank, cols), projections, num_warps=1,
        s_ptr=start, slots_ptr=slots,
        reads_ptr=reads, final_ptr=None if chunk else final, skipped_ptr=skipped,
        checkpoints_ptr=checkpoints, checkpoint_first_ptr=checkpoint_first,
        total_groups=chunks * heads, states=states, every=every, **tokens, **place, **state_strides(start),
        COLUMNS=cols, HAS_STATE=start is not None, HAS_SLOTS=slots is not None, HAS_CHECKPOINTS=bool(every),
        IS_PACKED=packed, IS_CHUNKED=bool(chunk),
    )  # fmt: skip
    launch(
        repair_kernel, sequences, projections, num_warps=1,
        x_ptr=projections, bias_ptr=gate_bias, s_ptr=state, slots_ptr=slots, mask_ptr=mask,
        flags_ptr=flags if says else None, cu_ptr=cu_seqlens, checkpoint_first_ptr=checkpoint_first,
        reads_ptr=reads, final_ptr=final, skipped_ptr=skipped, checkpoints_ptr=checkpoints,
        states=states, length=length, every=every, **raw, **strides("mask", "bt", mask), **state_strides(state),
        COLUMNS=cols, WIDTH=width, WIDTH_PAD=next_power_of_two(width),
        **rule_flags(rule, projections),
        HAS_STATE=state is not None, HAS_SLOTS=slots is not None, HAS_FLAGS=says, HAS_MASK=mask is not None,
        HAS_CHECKPOINTS=bool(every), IS_PACKED=packed, IS_CHUNKED=bool(chunk),
        BLOCK=min(1024, next_power_of_two(heads * rank * rank)),
    )  # fmt: skip
    return reads, final, skipped, checkpoints, flags
