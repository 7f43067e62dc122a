"""Loops compiled by numba on the threads that PyTorch's matmuls run on.

numba has a pool of threads of its own, but PyTorch's spin for a while after each matmul and would take the cores from
it. So the OpenMP library that PyTorch has loaded starts the region, on its own threads. What they do there is dealt
out by a counter in shared memory, and no part's numbers depend on who takes it.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core.types.function_type import CompileResultWAP
from numba.extending import intrinsic

from .machine import WORD, words_at


def _call_with(count: int):
    @intrinsic
    def call(context, job):
        """Call the C function at job[0] with the ``count`` integers behind it."""

        def generate(context, builder, signature, arguments):
            words = words_at(builder, arguments[0])
            loaded = [builder.load(builder.gep(words, [ir.Constant(WORD, n)])) for n in range(count + 1)]
            function = ir.FunctionType(ir.VoidType(), [WORD] * count)
            builder.call(builder.inttoptr(loaded[0], function.as_pointer()), loaded[1:])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return call


@functools.cache
def _region(count: int):
    """What OpenMP calls on every thread: one compiled function with ``count`` integers, named by the job."""
    call = _call_with(count)

    @cfunc(types.void(types.int64))
    def region(job):
        call(job)

    return region


@functools.cache
def _openmp():
    """``GOMP_parallel`` as PyTorch's libraries find it in this process, or None where there is none."""
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # TypeError: a platform that has no handle for the whole process
        return None
    start.restype, start.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return start if torch.backends.openmp.is_available() else None


def threads_for(parts: int) -> int:
    """How many threads ``parts`` parts of work get: one, or all of PyTorch's.

    Not fewer: libgomp would end the others, and PyTorch's next matmul start them anew.
    """
    return torch.get_num_threads() if parts > 1 and _openmp() is not None else 1


@functools.cache
def _address(function) -> int:
    """The address that C calls a compiled function by."""
    (compiled,) = function.overloads.values()
    return CompileResultWAP(compiled).address


def on_threads(function, arguments: tuple[int, ...], threads: int) -> None:
    """Call a compiled function on each of ``threads`` threads with the same integers; returns when all are done.

    The function has one signature, of integers alone.
    """
    job = np.array([_address(function), *arguments], np.int64)
    _openmp()(_region(len(arguments)).address, job.ctypes.data, threads, 0)
