"""The compiled operators in one namespace; see ``dispatch.Operators``.

``prefill_`` and ``BlockStep`` are this backend's alone.
"""

from .blocks import BlockStep
from .heads import decode_, delta, prefill_, steer_heads_, workspace
from .recurrence import read, scan, steer, step

__all__ = ["BlockStep", "decode_", "delta", "prefill_", "read", "scan", "steer", "steer_heads_", "step", "workspace"]
