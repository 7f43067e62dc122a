"""What numba has no function for: one rounding for a · b + c."""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic


@intrinsic
def fma(context, a, b, c):
    """a · b + c of float32, rounded once, whatever is compiled around it.

    The compiler's own fusing may take either product of a · b + c · d, another one in each copy of a loop. The
    processor has the instruction where it was built since 2013; elsewhere this is right, but slow.
    """
    if (a, b, c) != (types.float32,) * 3:
        return None

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(a, b, c), generate
