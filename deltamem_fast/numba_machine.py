"""What numba has no function for: one rounding for a · b + c, and memory by its address.

Handing an array from Python to a compiled function costs more than what a decoded token is computed with; an address
is an integer.
"""

from __future__ import annotations

import os
from types import ModuleType

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


def _pointer_to(dtype):
    @intrinsic
    def pointer(context, address):
        """The address, an integer, as a pointer, which ``numba.carray`` makes an array of."""
        if not isinstance(address, types.Integer):
            return None

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(address), generate

    return pointer


floats = _pointer_to(types.float32)
bytes_ = _pointer_to(types.uint8)
integers = _pointer_to(types.int32)
long_integers = _pointer_to(types.int64)


def changed(*modules: ModuleType) -> int:
    """A number that is another one when this file or one of the modules has changed.

    numba's cache on disk sees when the file of a compiled function changes, but not when others do, whose functions
    are compiled into it. It looks at the numbers that a function closes over, too: let this be one.
    """
    return hash(tuple(os.stat(path).st_mtime_ns for path in (__file__, *(module.__file__ for module in modules))))
