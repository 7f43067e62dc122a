"""Which tokens of a forward belong together: several sequences may be packed into one row."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import shown
from ..errors import ArgumentError, ArgumentTypeError

_HIDDEN = -1e4  # what is added to a score of what is hidden, at most
_HOLDS_SEVERAL = "a row holds several packed sequences"


def sequence_starts(
    arguments: dict[str, Any], cache, token_mask: torch.Tensor | None, batch: int, length: int
) -> torch.Tensor | None:
    """Where packed sequences start and end, int [N + 1] over the B · T tokens of the rows one after another, or None.

    None: each row is one sequence. A sequence starts where ``cu_seq_lens_q`` says (B = 1), or else: where ``seq_idx``
    changes; where the position of a real token does not follow on from that of the one before; where a prepared mask
    (4-D, or flex attention's) hides the token before; where the number in a 2-D mask changes, which may number the
    sequences (1, 1, 2, 2, 2, 0). With position_ids, seq_idx or a mask this waits for the device once.

    Args:
        arguments: of the decoder's forward, by name.
        cache: the KV cache that it was given, or None.
        token_mask: bool [B, T], True = a real token, or None = all are.

    Raises:
        ValueError: packed sequences with a cache: keys and values there have no borders.
    """
    cu_seqlens = arguments.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        if cache is not None:
            raise ArgumentError("past_key_values: got a cache with packed sequences (cu_seq_lens_q), allowed None")
        if batch != 1:
            raise ArgumentError(f"cu_seq_lens_q: got with a batch of {batch}, allowed 1")
        _check_starts(cu_seqlens, length)
        return cu_seqlens
    if length < 2:
        return None
    before = _real_before(token_mask, length)
    found = {
        "position_ids": _where_positions_restart(arguments.get("position_ids"), before, cache is not None),
        "seq_idx": _where_numbers_change(arguments.get("seq_idx"), before),
        "attention_mask": _where_mask_parts(arguments.get("attention_mask"), before, cache),
    }
    found = {name: starts for name, starts in found.items() if starts is not None}
    if not found:
        return None
    if torch.compiler.is_compiling():
        # How many there are decides shapes, which traced code cannot ask for.
        for name, starts in found.items():
            torch._assert_async(~_real(starts, before, token_mask).any(), _compiled(name))
        return None
    starts = torch.zeros(batch, length - 1, dtype=torch.bool, device=next(iter(found.values())).device)
    for more in found.values():
        starts |= more.to(starts.device)
    starts = _real(starts, before, token_mask)
    if not bool(starts.any()):
        return None
    if cache is not None:
        names = " and ".join(name for name, more in found.items() if bool(_real(more, before, token_mask).any()))
        raise ArgumentError(
            f"past_key_values: got a cache, but by {names} {_HOLDS_SEVERAL}; allowed None (use_cache=False)"
        )
    first = torch.ones(batch, 1, dtype=torch.bool, device=starts.device)
    places = torch.cat([first, starts], 1).flatten().nonzero().flatten()
    return torch.cat([places, places.new_full((1,), batch * length)])


def _check_starts(cu_seqlens, length: int) -> None:
    """Raise unless ``cu_seq_lens_q`` is an integer tensor [N + 1]; where asking costs nothing, also of its values."""
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise ArgumentTypeError(f"cu_seq_lens_q: got {found}, allowed an int32 or int64 tensor")
    if cu_seqlens.ndim != 1 or not cu_seqlens.numel():
        raise ArgumentError(f"cu_seq_lens_q: got shape {list(cu_seqlens.shape)}, allowed [sequences + 1]")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != length or starts != sorted(starts):
            raise ArgumentError(
                f"cu_seq_lens_q: got {shown(starts)}, allowed a non-decreasing list from 0 to T = {length}"
            )


def _compiled(name: str) -> str:
    return f"{name}: by it {_HOLDS_SEVERAL}; compiled forwards need cu_seq_lens_q as well, to give each its own memory"


def _real_before(token_mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """int64 [B or 1, T − 1]: of each token from the second on, the place of the last real one before it; −1: none."""
    device = "cpu" if token_mask is None else token_mask.device
    places = torch.arange(length, device=device).unsqueeze(0)
    if token_mask is not None:
        places = torch.where(token_mask, places, -1).cummax(-1).values
    return places[:, :-1]


def _real(starts: torch.Tensor, before: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """``starts`` [B, T − 1] without those of tokens that are not real, or have no real one before them."""
    if token_mask is None:
        return starts
    return starts & (token_mask[:, 1:] & (before >= 0)).to(starts.device)


def _at(values: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """What stands in ``values`` [B or 1, T] at the places ``before``."""
    before = before.to(values.device).clamp(min=0)
    rows = max(values.shape[0], before.shape[0])
    return values.expand(rows, -1).gather(1, before.expand(rows, -1))


def _one_a_token(values, before: torch.Tensor) -> bool:
    return isinstance(values, torch.Tensor) and values.ndim == 2 and values.shape[1] == before.shape[1] + 1


def _where_positions_restart(positions, before: torch.Tensor, with_cache: bool) -> torch.Tensor | None:
    """bool [B or 1, T − 1]: where a token's position is not the next one. A cache's rows may have gaps."""
    if isinstance(positions, torch.Tensor) and positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of text, in front of those of images
    if not _one_a_token(positions, before):
        return None
    steps = positions[:, 1:] - _at(positions, before)
    if with_cache:
        return steps < 1
    # Positions count the real tokens, or all of them.
    places = torch.arange(1, positions.shape[1], device=positions.device)
    return (steps != 1) & (steps != places - before.to(positions.device))


def _where_numbers_change(numbers, before: torch.Tensor) -> torch.Tensor | None:
    if not _one_a_token(numbers, before):
        return None
    return numbers[:, 1:] != _at(numbers, before)


def _where_mask_parts(mask, before: torch.Tensor, cache) -> torch.Tensor | None:
    """bool [B or 1, T − 1]: where a mask says that a sequence starts; a 2-D one of 0 and 1 does so nowhere."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return _where_hidden(mask, before, cache)
    if mask.dtype == torch.bool or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    starts = _where_numbers_change(mask, before)
    # 0 numbers no sequence: it hides a token from attention, which token_mask may still call real.
    return None if starts is None else starts & (mask[:, 1:] != 0) & (_at(mask, before) != 0)


def _where_hidden(mask, before: torch.Tensor, cache) -> torch.Tensor | None:
    """bool [B or 1, T − 1]: where a prepared mask hides from a token the one before it.

    Of masks by kind of layer the full attention's: the others hide by distance, too.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    by_rule = hasattr(mask, "mask_mod")
    if not by_rule and (not isinstance(mask, torch.Tensor) or mask.ndim != 4):
        return None
    past = 0 if cache is None else cache.get_seq_length()
    if by_rule:
        return ~_seen_by_rule(mask, before.clamp(min=0), past)
    length = before.shape[1] + 1
    if isinstance(past, int) and past + length > mask.shape[3]:
        return None  # a sliding window's columns, which begin elsewhere
    tokens = torch.arange(1, length, device=mask.device)
    columns = before.to(mask.device).clamp(min=0) + past
    if not isinstance(past, int):
        # Where its columns are too few, as a window's, each token is taken to see the last one of them.
        columns = columns.clamp(max=mask.shape[3] - 1)
    rows = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1)
    seen = mask[:, 0].expand(-1, length, -1)[rows, tokens.unsqueeze(0), columns]
    # Boolean and integer masks say what is seen, floating ones what is added to a score (perhaps a bias as well).
    return seen <= _HIDDEN if seen.is_floating_point() else seen == 0


def _seen_by_rule(mask, before: torch.Tensor, past) -> torch.Tensor:
    """bool [B, T − 1]: whether flex attention's rule lets a token see the one before it."""
    device = mask.kv_num_blocks.device
    before = before.to(device)
    rows = torch.arange(max(mask.shape[0], before.shape[0]), device=device)
    tokens = torch.arange(1, before.shape[1] + 1, device=device)
    head = torch.zeros((), dtype=torch.int64, device=device)

    def one(row: torch.Tensor, token: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        return mask.mask_mod(row, head, token + past, earlier + past)

    return torch.vmap(torch.vmap(one, (None, 0, 0)))(rows, tokens.expand(len(rows), -1), before.expand(len(rows), -1))
