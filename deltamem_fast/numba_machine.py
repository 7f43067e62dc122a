"""What numba has no function for: one rounding for a · b + c, memory by its address, and words that threads share.

Handing an array from Python to a compiled function costs more than what a decoded token is computed with; an address
is an integer.
"""

from __future__ import annotations

import os
import platform
from types import ModuleType

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WORD = ir.IntType(64)


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


def words_at(builder, address):
    """An address, an integer, as a pointer to 64-bit words."""
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic
def take(context, address):
    """The 64-bit word at ``address``, which grows by one; no two threads get the same."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", words_at(builder, arguments[0]), ir.Constant(WORD, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def publish(context, address, value):
    """Write the 64-bit word at ``address``; who sees it by ``seen`` sees all that was written before, too."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], words_at(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def pause(context):
    """A moment's rest in a loop that waits for another thread, which may share this one's core."""

    def generate(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def seen(context, address):
    """The 64-bit word at ``address``, as ``publish`` wrote it."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(words_at(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), generate


def changed(*modules: ModuleType) -> int:
    """A number that is another one when this file or one of the modules has changed.

    numba's cache on disk sees when the file of a compiled function changes, but not when others do, whose functions
    are compiled into it. It looks at the numbers that a function closes over, too: let this be one.
    """
    return hash(tuple(os.stat(path).st_mtime_ns for path in (__file__, *(module.__file__ for module in modules))))
