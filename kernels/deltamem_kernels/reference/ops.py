"""The reference's operators in one namespace; see ``dispatch.Operators``."""

from .heads import decode_, delta, steer_heads_, workspace
from .recurrence import read, scan, steer, step

__all__ = ["decode_", "delta", "read", "scan", "steer", "steer_heads_", "step", "workspace"]
