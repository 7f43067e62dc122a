"""What tests/quick_interpreter.py makes of Triton's interpreter."""

import os

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def doubled_kernel(x_ptr):
    p = x_ptr + tl.arange(0, 4)
    tl.store(p, tl.load(p) + tl.load(p))


@pytest.mark.skipif(os.environ.get("DELTAMEM_PLAIN_INTERPRETER") == "1", reason="Triton's own interpreter wraps around")
@pytest.mark.skipif("DELTAMEM_EMULATED" in os.environ, reason="compiled kernels wrap around")
def test_an_overflow_of_integers_is_an_error():
    x = torch.tensor([0, 1, -(2**30), 2**30 - 1], dtype=torch.int32)
    doubled_kernel[(1,)](x)
    assert x.tolist() == [0, 2, -(2**31), 2**31 - 2]
    with pytest.raises(Exception, match="add of int32"):
        doubled_kernel[(1,)](x)
