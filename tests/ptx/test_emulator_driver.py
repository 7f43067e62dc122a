"""What the emulator checks of a launch before it runs: that the compiler was told the truth about the arguments."""

from types import SimpleNamespace

import pytest
import torch
from emulator import EmuError
from emulator.driver import _arguments, _check_specialization, _parameter


def source(signature, constants=(), attrs=()):
    return SimpleNamespace(name="made_up", signature=dict(signature), constants=dict(constants), attrs=dict(attrs))


def test_arguments_and_parameters():
    tensor = torch.zeros(2)
    given = source({"x": "*fp32", "n": "i32", "BLOCK": "constexpr", "scale": "fp32", "far": "i64"})
    arguments, constants = _arguments(given, (tensor, -1, 16, 1.5, 2**40))
    assert constants == {"BLOCK": 16}
    bits = [_parameter(given.signature[name], value) for name, value in arguments.items()]
    assert bits == [tensor.data_ptr(), 2**32 - 1, 0x3FC00000, 2**40]
    assert _parameter("i1", True) == 1


def test_what_the_compiler_was_told_must_hold():
    tensor = torch.zeros(16)[1:]
    divisible = source({"x": "*fp32", "n": "i32"}, attrs={(0,): [["tt.divisibility", 16]]})
    with pytest.raises(EmuError, match="x = .* was said to be divisible by 16"):
        _check_specialization(divisible, (tensor, 3))
    _check_specialization(divisible, (torch.zeros(16), 3))
    with pytest.raises(EmuError, match="n was said to be 1, is 2"):
        _check_specialization(source({"x": "*fp32", "n": "constexpr"}, {(1,): 1}), (tensor, 2))
    with pytest.raises(EmuError, match="n = 4294967296 does not fit i32"):
        _check_specialization(source({"x": "*fp32", "n": "i32"}), (tensor, 2**32))
