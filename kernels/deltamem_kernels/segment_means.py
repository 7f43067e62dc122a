"""Segment means for SSW."""

from __future__ import annotations

import torch


def segment_means(projections: torch.Tensor, segment_ids: torch.Tensor, mask: torch.Tensor | None):
    """Mean of each segment's raw projections.

    The projections are linear, so the projection of a mean is the mean of the projections; taking it here costs
    W numbers a token instead of d. No host synchronisation (every row gets T places, the absent ones masked) and
    no atomics (tokens are sorted by segment), so the same bits on every run.

    Args:
        projections: [B, T, W], raw.
        segment_ids: int [B, T]; −1 = not written. Any non-negative ids, tokens in any order.
        mask: bool [B, T], True = a real token, or None.

    Returns:
        means, float32 (float64 stays) [B, T, W], segments in ascending id; present, bool [B, T]; skipped, int32
        [B], tokens left out because they were not finite.
    """
    batch, length, width = projections.shape
    wide = projections if projections.dtype == torch.float64 else projections.float()
    wanted = segment_ids >= 0
    if mask is not None:
        wanted = wanted & mask
    finite = torch.isfinite(projections).all(-1)
    used = wanted & finite
    skipped = (wanted & ~finite).sum(1, dtype=torch.int32)

    # Unused tokens sort behind all segments, into a place of their own that is not present.
    keys = torch.where(used, segment_ids.long(), torch.iinfo(torch.int64).max)
    ordered, order = keys.sort(dim=1, stable=True)
    used = used.gather(1, order)
    starts = torch.ones_like(used)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = starts.long().cumsum(1) - 1
    values = wide.gather(1, order.unsqueeze(-1).expand(-1, -1, width))
    values = torch.where(used.unsqueeze(-1), values, 0.0)

    lengths = torch.zeros_like(place).scatter_add(1, place, torch.ones_like(place))
    present = torch.zeros_like(place).scatter_add(1, place, used.long()) > 0
    sums = torch.segment_reduce(
        values.reshape(batch * length, width), "sum", lengths=lengths.reshape(-1), axis=0, unsafe=True
    ).reshape(batch, length, width)
    return sums / lengths.clamp(min=1).unsqueeze(-1), present, skipped
