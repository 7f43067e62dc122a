"""Triton's interpreter, with what it works out anew at every operation kept: the same results in half the time.

It runs a kernel operation by operation on NumPy arrays, of a few elements each in these tests, so that nearly all the
time goes into what surrounds them: patching triton.language at every call of a device function, and making types. A
part that an installed Triton does not have stays as it is. Under DELTAMEM_PLAIN_INTERPRETER=1 (make soak) all does.
"""

import functools
import operator
import os

import numpy as np


def install():
    """For a process that has TRITON_INTERPRET=1, before kernels run."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if os.environ.get("DELTAMEM_PLAIN_INTERPRETER") == "1" or hasattr(tl.core.tensor.__init__, "__wrapped__"):
        return
    patch_once_a_launch(tl, interpreter)
    keep_types(tl.core)
    for owner, name, quick in (
        (interpreter, "_get_np_dtype", kept_on_the_type),
        (TritonSemantic, "broadcast_impl_value", same_shapes_stay(tl.core)),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", overflows_are_errors),
    ):
        if hasattr(owner, name):
            setattr(owner, name, quick(getattr(owner, name)))


def patch_once_a_launch(tl, interpreter):
    """Triton patches its language at every call of a device function, each time looking through all members of it."""
    patch, scope_type = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if patch is None or scope_type is None:
        return
    patched = set()

    @functools.cache
    def modules(fn):
        found = fn.__globals__.values()
        return frozenset(name for name, lang in (("tl", tl), ("core", tl.core)) if any(v is lang for v in found))

    def once(fn):
        if modules(fn) <= patched:
            return scope_type()
        scope, outermost = patch(fn), not patched
        patched.update(modules(fn))
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = once


def keep_types(core):
    """Block types of one element and shape share what they hold, and what a tensor takes from its type lies there.

    Kept on the types themselves, most of which cannot be hashed.
    """
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__

    @functools.wraps(make_type)
    def block_type(self, element_ty, shape):
        made = element_ty.__dict__.setdefault("_blocks", {})
        sizes = tuple([getattr(size, "value", size) for size in shape])
        if sizes not in made:
            make_type(self, element_ty, shape)
            made[sizes] = self.__dict__
        self.__dict__ = made[sizes]

    @functools.wraps(make_tensor)
    def tensor(self, handle, type):
        of_type = type.__dict__.get("_of_a_tensor")
        if of_type is None:
            make_tensor(self, handle, type)
            type._of_a_tensor = {k: v for k, v in self.__dict__.items() if k not in ("handle", "type")}
            return
        self.__dict__.update(of_type)
        self.handle, self.type = handle, type

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def kept_on_the_type(find):
    """The type of NumPy's numbers that are a tensor's."""

    @functools.wraps(find)
    def np_dtype(type):
        if "_np_dtype" not in type.__dict__:
            type._np_dtype = find(type)
        return type._np_dtype

    return np_dtype


def same_shapes_stay(core):
    """Broadcasting of two tensors of one shape, without comparing it size by size."""

    def quick(broadcast):
        @functools.wraps(broadcast)
        def broadcast_impl_value(self, lhs, rhs):
            left, right = lhs.type, rhs.type
            if isinstance(left, core.block_type) and isinstance(right, core.block_type):
                if list(left.shape) == list(right.shape):
                    return lhs, rhs
            return broadcast(self, lhs, rhs)

        return broadcast_impl_value

    return quick


def overflows_are_errors(check):
    """Triton computes for each sum, difference and product of integers whether it overflows, and then tells nobody,
    but under TRITON_DEBUG."""
    known = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}

    @functools.wraps(check)
    def binary_op_sanitize_overflow_impl(self, lhs, rhs, binary_op):
        left, right, compute = lhs.handle.data, rhs.handle.data, known[binary_op.__name__]
        if left.dtype.kind in "iu" and left.itemsize < 8:
            wide, limits = compute(left.astype(np.int64), right.astype(np.int64)), np.iinfo(left.dtype)
            if wide.min(initial=0) < limits.min or limits.max < wide.max(initial=0):
                raise OverflowError(f"{binary_op.__name__} of {left.dtype}: got {left} and {right}")

    return binary_op_sanitize_overflow_impl
