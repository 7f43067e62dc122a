"""What the emulator checks of a launch before it runs: that the compiler was told the truth about the arguments."""

from types import SimpleNamespace
from typing import NamedTuple

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


class Rows(NamedTuple):
    x: object
    n: object
    BLOCK: object


def test_arguments_in_tuples():
    tensor = torch.zeros(16)
    given = source(
        {"rows": Rows("*fp32", "i32", "constexpr"), "n": "i32"}, {(0, 2): 8}, {(0, 1): [["tt.divisibility", 16]]}
    )
    assert _arguments(given, ((tensor, 32, 8), 3)) == ({"rows.x": tensor, "rows.n": 32, "n": 3}, {"rows.BLOCK": 8})
    _check_specialization(given, ((tensor, 32, 8), 3))
    for wrong, message in (
        ((tensor, 33, 8), "rows.n = 33 was said to be divisible by 16"),
        ((tensor, 32, 4), "rows.BLOCK was said to be 8, is 4"),
        ((tensor, 2**32, 8), "rows.n = 4294967296 does not fit i32"),
    ):
        with pytest.raises(EmuError, match=message):
            _check_specialization(given, (wrong, 3))
    with pytest.raises(ValueError, match="shorter"):
        _arguments(given, ((tensor, 32), 3))


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
