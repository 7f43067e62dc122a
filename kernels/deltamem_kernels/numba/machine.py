"""What numba has no function for: one rounding for a · b + c, memory by its address, and words that threads share.

Handing an array from Python to a compiled function costs more than what a decoded token is computed with; an address
is an integer.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
from types import ModuleType

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.extending import intrinsic

WORD = ir.IntType(64)
STAMP = "stamp"  # what functions call the number of ``changed`` that they close over
logger = logging.getLogger("deltamem_fast")


class _KeyedFiles(IndexDataCacheFile):
    """The files of one function's cache, each compiled version in a file that is named by what it was compiled from.

    numba numbers them. Two processes that compile a function for two ranks at the same time, and see the same index,
    would give both the same number, and later processes would load one rank's code for the other's.
    """

    def save(self, key, data):
        digest = hashlib.sha256(repr((key, self._source_stamp)).encode()).hexdigest()
        data_name = self._data_name_pattern.format(number=int(digest[:15], 16))
        self._save_data(data_name, data)
        overloads = self._load_index()  # of two processes one may take the other's entry out: that is compiled again
        if not overloads:
            self._remove_all_but(data_name)  # of older sources
        if overloads.get(key) != data_name:
            overloads[key] = data_name
            self._save_index(overloads)

    def _remove_all_but(self, data_name: str) -> None:
        start = self._index_name.removesuffix("nbi")
        for name in os.listdir(self._cache_path):
            if name.startswith(start) and name.endswith(".nbc") and name != data_name:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self._cache_path, name))


class _OptionalCache(FunctionCache):
    """numba's cache of one function on disk, which is never what a call fails with, nor gives it another's code.

    numba itself lets a full disk, a right that was taken away and a damaged file through to the function's caller.
    """

    def __init__(self, py_func):
        super().__init__(py_func)
        locator = self._impl.locator
        self._cache_file = _KeyedFiles(self._cache_path, self._impl.filename_base, locator.get_source_stamp())

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a damaged file's bytes can mean anything
            _warn_of_cache("cannot be read", self.cache_path, f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_of_cache("cannot be written", self.cache_path, error.strerror or type(error).__name__)


@functools.cache
def _warn_of_cache(what: str, path: str, reason: str) -> None:
    """One warning for each reason."""
    logger.warning("numba: the cache %s %s (%s); functions are compiled again instead", path, what, reason)


def njit(*signature, **options):
    """``numba.njit`` whose cache on disk may fail, and whose machine code has a name of its own.

    numba makes that name of the function's, its arguments' types and a number that counts in a process. One function,
    made for two ranks in two processes, can so have one name twice in the cache; a third process that loads both would
    call, by address, one rank's code for the other's. The integers that it closes over tell them apart, all but
    ``stamp``: code of two sources is never loaded into one process, and files of older sources are found by the name.
    """

    def compiled(function):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            if name != STAMP and isinstance(cell.cell_contents, int):
                function.__qualname__ += f".{name}_{cell.cell_contents}"
        made = numba.njit(**options)(function)
        if options.get("cache") and hasattr(made, "_cache"):  # not under NUMBA_DISABLE_JIT
            made._cache = _OptionalCache(function)
        if signature and made is not function:
            made.compile(*signature)
            made.disable_compile()
        return made

    return compiled


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
