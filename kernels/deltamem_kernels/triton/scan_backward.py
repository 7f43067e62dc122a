"""The gradient of ``scan``: every token's, from the states before it and the gradients of the states after it.

With G = dL/dS_t, the gradient of the state after token t, d = dL/dread_t, and for row i (s of S_{t-1}, g of G)

    p = s · k        u = write v − erase p        S_t = keep s + u k
    du = g · k       dp = −erase du
    dq = Σ_i d s     dk = Σ_i (u g + dp s)        dv = write du
    dkeep = g · s    derase = −p du               dwrite = v du
    g <- g (keep I − erase k kᵀ) + d q

the rows of G obey, backwards in time, the affine recurrence of the rows of S with the same symmetric matrices: the
matrix of a chunk is the forward one transposed. What the forward pass did with chunks is done here with both at once
(``chunk_scan_backward``, ``projection_gradient``):

    1. ``chunk_transition_backward_kernel``: each chunk's matrix, and its vector in either direction, all at once;
    2. ``state_passing_backward_kernel``: the states before the chunks and the gradients after them, side by side;
    3. ``block_states_kernel``: inside the chunks the same at the bounds of blocks of SPACING tokens;
    4. ``projection_gradient_kernel``: every PART of a block goes to its own few tokens from the block's two bounds,
       holds their states in registers, and goes back through them: a row of the projections' gradient each.

A short sequence, or a rank above 16, is one chunk: 3 and 4 alone. Nothing of the forward pass is kept; no state is
stored but at the bounds, 2 r² numbers for 2 r tokens. Sums over the rows of a head are sums over neighbouring columns,
that is threads; sums over tokens (of the gates' biases) are made in two passes: no atomics.
"""

from __future__ import annotations

import torch
import triton

from ..errors import ArgumentError
from ..rule import DeltaRule, check_shape, check_together
from . import launch as _launch
from .chunk_scan_backward import block_states_kernel, chunk_transition_backward_kernel, state_passing_backward_kernel
from .launch import (
    MOST_REGISTERS,
    bytes_and_slots,
    check_tokens,
    dense_state,
    half_or_single,
    launch,
    next_power_of_two,
    rule_flags,
    state_strides,
    strides,
    tile,
)
from .projection_gradient import parts_together, projection_gradient_kernel, token_tile
from .scan import CHUNKED_RANK, TRANSITION_WARPS, choose_chunk, cut, first_checkpoints
from .scan import depth as depth_of_scan
from .token_parts import find_flags


def choose_spacing(rule: DeltaRule) -> tuple[int, int]:
    """Tokens between two stored bounds, and tokens of a part.

    2 r² numbers for 2 r tokens weigh what the reads do. As many states as a part has tokens stay in registers.
    """
    rows = next_power_of_two(rule.rank)
    return max(16, 2 * rows), 4 if rows <= 8 else 2


def depth(rule: DeltaRule, length: int) -> int:
    """How many steps of the gradient wait for one another: C, T / C and C, or T; then those of a block and a part."""
    return depth_of_scan(rule, length) + sum(choose_spacing(rule))


def scatter_rows(grad: torch.Tensor, state: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """The gradient of the rows [N, H, r, r] → that of the state they were taken from."""
    if slots is None:
        return grad
    live = (slots >= 0) & (slots < state.shape[0])
    grad = torch.where(live[:, None, None, None], grad, 0.0)
    # index_put_ sorts where index_add_ takes atomics: two sequences may start from one slot.
    return torch.zeros_like(state, memory_format=torch.contiguous_format).index_put_(
        (torch.where(live, slots, 0).long(),), grad, accumulate=True
    )


def check_gradient(name: str, grad: torch.Tensor, shape: tuple[int, ...], projections: torch.Tensor) -> None:
    """Raises: ValueError unless the gradient has the shape of what it is the gradient of, beside the projections;
    TypeError unless it is bfloat16, float16 or float32."""
    check_shape(name, grad, shape)
    half_or_single(name, grad)
    check_together("projections", projections, **{name: grad})


def scan_backward(
    d_reads: torch.Tensor,
    d_state: torch.Tensor,
    projections: torch.Tensor,
    gate_bias: torch.Tensor,
    state: torch.Tensor | None,
    rule: DeltaRule,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    d_checkpoints: torch.Tensor | None = None,
    checkpoint_every: int = 0,
    flags: torch.Tensor | None = None,
    chunk: int | None = None,
    spacing: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient of ``scan``, of which it takes the arguments.

    Args:
        d_reads: [B, T, H·r], the gradient of ``reads``, of any strides.
        d_state: [N, H, r, r], of the final ``state``, of any strides.
        d_checkpoints: of ``checkpoints``, in their layout, or None.
        flags: uint8 [B, T], which tokens the scan has written (``scan_with_flags``); None: all that are unmasked and
            finite, which is right where the states after them are finite, too.
        chunk: tokens per chunk, 0 for one chunk a sequence, None to choose (tests set it).
        spacing: tokens of a block, which divide the chunk's, and of a part, which divide the block's (tests set it).

    Returns:
        The gradients of projections, gate_bias and state (None without a state), each in the dtype and shape of
        what it belongs to, computed in float32. A token that was not written gets 0, and so does a sequence whose
        slot is −1. The same bits on every run.

    Raises:
        ValueError, TypeError: see ``scan``; a gradient of another shape than what it belongs to.
    """
    sequences = check_tokens(
        projections, gate_bias, state, rule,
        mask=mask, cu_seqlens=cu_seqlens, slots=slots, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    batch, length, width = projections.shape
    heads, rank, every = rule.heads, rule.rank, checkpoint_every if d_checkpoints is not None else 0
    device, packed = projections.device, cu_seqlens is not None
    if chunk is None:
        chunk = choose_chunk(rule, length)
    nothing = projections.numel() == 0 or sequences == 0
    if nothing:
        chunk = 0
    block, part = spacing or choose_spacing(rule)
    if (chunk and rank > CHUNKED_RANK) or chunk % block or block % part:
        raise ArgumentError(f"chunk, spacing: got {chunk}, {(block, part)}, allowed multiples, no chunk above rank 16")
    check_gradient("d_reads", d_reads, (batch, length, rule.read_width), projections)
    check_gradient("d_state", d_state, (sequences, heads, rank, rank), projections)
    if every:
        lead = (length // every,) if packed else (batch, length // every)
        check_gradient("d_checkpoints", d_checkpoints, (*lead, heads, rank, rank), projections)
    mask, slots = bytes_and_slots(mask, slots)
    states = 0 if state is None else state.shape[0]
    if packed:
        cu_seqlens = cu_seqlens.contiguous()
    if every:
        d_checkpoints = d_checkpoints.contiguous()

    float32 = {"dtype": torch.float32, "device": device}
    d_initial = _launch.empty((sequences, heads, rank, rank), **float32)

    checkpoint_first = first_checkpoints(cu_seqlens, every)
    chunks, chunks_per_sequence, chunk_sequence, chunk_first = cut(cu_seqlens, sequences, length, chunk)
    blocks, blocks_per_sequence, block_sequence, block_first = cut(cu_seqlens, sequences, length, block)
    if nothing:  # though packed sequences have a block more than their tokens fill
        blocks = 0
    if flags is None:
        flags = find_flags(projections, mask)
    common = {
        "x_ptr": projections, "bias_ptr": gate_bias, "flags_ptr": flags, "d_reads_ptr": d_reads,
        "d_checkpoints_ptr": d_checkpoints if every else None, "checkpoint_first_ptr": checkpoint_first,
        "cu_ptr": cu_seqlens, "length": length, "every": every, "stride_bias": gate_bias.stride(0),
        "HAS_CHECKPOINTS": bool(every), "IS_PACKED": packed,
    }  # fmt: skip
    common |= strides("x", "btw", projections) | strides("d", "btc", d_reads) | rule_flags(rule, projections)
    place = {"chunk_length": chunk or length, "chunks_per_sequence": chunks_per_sequence}
    place |= {"chunk_sequence_ptr": chunk_sequence, "chunk_first_ptr": chunk_first}
    initial = {"s_ptr": state, "slots_ptr": slots, "d_state_ptr": d_state, "d_initial_ptr": d_initial, "states": states}
    initial |= {"HAS_STATE": state is not None, "HAS_SLOTS": slots is not None, **state_strides(state)}
    rows, cols = tile(rule)

    edges = None
    if chunk:
        edges = _launch.empty((chunks, heads, 2, rank, rank), **float32)
        transitions = _launch.empty((chunks, heads, rank, rank + 2, rank), **float32)
        launch(
            chunk_transition_backward_kernel, triton.cdiv(chunks * heads * rank * (rank + 2), TRANSITION_WARPS * cols),
            projections, num_warps=TRANSITION_WARPS, transitions_ptr=transitions, total_groups=chunks * heads,
            COLUMNS=TRANSITION_WARPS * cols, **common, **place,
        )  # fmt: skip
        launch(
            state_passing_backward_kernel, 2 * sequences * heads * rank, projections, num_warps=1,
            transitions_ptr=transitions, edges_ptr=edges, chunk_first_ptr=chunk_first,
            chunks_per_sequence=chunks_per_sequence, stride_m_a=rank, stride_m_j=1,
            HEADS=heads, RANK=rank, R=rows, IS_PACKED=packed, **initial, **strides("d", "nhij", d_state),
        )  # fmt: skip
        del transitions
    bounds = _launch.empty((blocks, heads, 2, rank, rank), **float32)
    if sequences:
        launch(
            block_states_kernel, triton.cdiv(chunks * heads * 2 * rank, cols), projections, num_warps=1,
            registers=None if rank <= 8 else MOST_REGISTERS,
            edges_ptr=edges, bounds_ptr=bounds, block_first_ptr=block_first, blocks_per_sequence=blocks_per_sequence,
            total_groups=chunks * heads, COLUMNS=cols, IS_CHUNKED=bool(chunk), SPACING=block,
            DENSE_GRADIENT=dense_state(d_state), **strides("g", "nhij", d_state), **common, **place, **initial,
        )  # fmt: skip
    del edges
    # Tokens outside of every packed sequence are written by no kernel.
    d_x = (torch.zeros if packed else _launch.empty)(projections.shape, dtype=projections.dtype, device=device)
    cols, warps = token_tile(rule)
    padded = triton.cdiv(blocks, cols // rows) * (cols // rows)
    kinds = 2 if rule.has_lambda else 1
    together = parts_together(rule, block // part)
    d_bias = _launch.empty((heads, padded * rows // cols * (block // part) // together, kinds, rows), **float32)
    if d_bias.numel():
        launch(
            projection_gradient_kernel, d_bias.numel() // (kinds * rows), projections, num_warps=together * warps,
            registers=None if rank <= 8 else MOST_REGISTERS,
            slots_ptr=slots, bounds_ptr=bounds, d_x_ptr=d_x, d_bias_ptr=d_bias,
            block_sequence_ptr=block_sequence, block_first_ptr=block_first, blocks_per_sequence=blocks_per_sequence,
            total_groups=block // part * heads * padded, blocks=blocks, padded_blocks=padded,
            states=states, COLUMNS=together * cols, TOGETHER=together,
            HAS_SLOTS=slots is not None, WIDTH=width, SPACING=block, PART=part, **common,
        )  # fmt: skip
    # One gate a row, or one a head, which every row of it has.
    d_bias = d_bias.sum(1).transpose(0, 1)[..., : rank if rule.row_gates else 1]
    d_bias = d_bias.reshape(rule.bias_width).to(gate_bias.dtype)
    return d_x, d_bias, None if state is None else scatter_rows(d_initial, state, slots)
