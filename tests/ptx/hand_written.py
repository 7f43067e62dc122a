"""Kernels written in PTX by hand, run on numpy arrays."""

from __future__ import annotations

import re

import numpy as np
from emulator import Buffer, Compiled, Launch

REGISTERS = {"%p": "pred", "%rs": "b16", "%r": "b32", "%rd": "b64"}
HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry hand_written(
{params}
)
.reqntid {threads}
{{
{registers}
{loads}
{body}
}}
"""
# %r0 is the lane, %r1 the thread, %r2 the program; %rd0, %rd1, … are the parameters.
LOADS = "mov.u32 %r0, %laneid;\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\n"


def text(body: str, parameters: int, threads: int = 32) -> str:
    """PTX of a kernel whose parameters are pointers."""
    params = ",\n".join(f".param .u64 .ptr .global .align 1 hand_written_param_{n}" for n in range(parameters))
    loads = LOADS + "".join(f"ld.param.b64 %rd{n}, [hand_written_param_{n}];\n" for n in range(parameters))
    registers = "\n".join(f".reg .{kind} {name}<32>;" for name, kind in REGISTERS.items())
    lines = re.sub(r";\s*", ";\n", body)  # an instruction is known by its line
    return HEAD.format(params=params, threads=threads, registers=registers, loads=loads, body=lines)


def launch(body: str, *arrays: np.ndarray, threads: int = 32, grid: int = 1, shared: int = 0, seed: int = 0, **options):
    """Run a kernel over arrays, which it may change → the launch."""
    compiled = Compiled(text(body, len(arrays), threads))
    buffers = [Buffer(a.ctypes.data, a.nbytes, f"array {n}") for n, a in enumerate(arrays)]
    made = Launch(compiled, grid, [a.ctypes.data for a in arrays], buffers, shared, seed, **options)
    made.run()
    return made


def aligned(values, dtype) -> np.ndarray:
    """A copy that begins at a multiple of 64 bytes, so that its sectors are known."""
    values = np.asarray(values, dtype)
    raw = np.zeros(values.nbytes + 64, np.uint8)
    first = -raw.ctypes.data % 64
    out = raw[first : first + values.nbytes].view(dtype).reshape(values.shape)
    out[...] = values
    return out


def per_lane(expression: str, *inputs, result: str = "b32", dtype=np.uint32) -> np.ndarray:
    """What instructions make of vectors of 32 numbers each.

    Args:
        expression: reads %r10, %r11, … (``b32``) or %rs10, … (``b16``) or %rd10, … (``b64``), by the inputs' sizes, and
            leaves its result in %r20, %rs20 or %rd20.
        result: its register's type.
        dtype: of what is returned.
    """
    names, lines = {2: "%rs", 4: "%r", 8: "%rd"}, []
    for n, values in enumerate(inputs):
        size = values.dtype.itemsize
        lines += [f"mad.wide.u32 %rd31, %r0, {size}, %rd{n};", f"ld.global.b{8 * size} {names[size]}{10 + n}, [%rd31];"]
    size = int(result[1:]) // 8
    lines += [expression, f"mad.wide.u32 %rd31, %r0, {size}, %rd{len(inputs)};"]
    lines += [f"st.global.b{8 * size} [%rd31], {names[size]}20;", "ret;"]
    out = aligned(np.zeros(32), dtype)
    launch("\n".join(lines), *(aligned(v, v.dtype) for v in inputs), out)
    return out


def found(launched) -> set[str]:
    """What a launch has found, without names and places."""
    return {re.sub(r" array \d+", "", what) for what, _ in launched.problems}
