"""The second launch of a decoded token goes past Triton's binder: same arguments, in the kernel's order."""

import pytest
import torch

heads = pytest.importorskip("deltamem_kernels.triton.heads", reason="needs Triton")
from deltamem_kernels.layout import HeadLayout, Steering  # noqa: E402
from deltamem_kernels.rule import DeltaRule  # noqa: E402


class Compiled:
    """Stands in for a compiled kernel: takes down what it is launched with."""

    def __init__(self):
        self.grids, self.calls = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *values: self.calls.append(values)


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(heads, "_plans", {})
    found = []

    def launch(kernel, programs, tensor, *, num_warps, registers, **arguments):
        found.append((programs, arguments, Compiled()))
        return found[-1][2]

    monkeypatch.setattr(heads, "launch", launch)
    return found


def decode(batch=2, dtype=torch.bfloat16, shift=0, scale=2.0, q_rows=32, **options):
    rule, layout = DeltaRule(8), HeadLayout(2, 1, 1, 16, 16)
    wide = torch.zeros(batch * (layout.width + rule.width) + 8, dtype=dtype)
    packed = wide[shift : shift + batch * (layout.width + rule.width)].view(batch, -1)
    steering = Steering(q=torch.zeros(q_rows, 8, dtype=dtype), o=torch.zeros(20, 8, dtype=dtype), scale=scale)
    cos = torch.zeros(1, 1, 16, dtype=dtype)
    given = {
        "packed": packed, "gate_bias": torch.zeros(8), "state": torch.zeros(batch, 1, 8, 8),
        "skipped": torch.zeros(batch, dtype=torch.int32), "arrived": torch.zeros(batch, dtype=torch.int32),
    }  # fmt: skip
    found = heads.decode_(given["packed"], given["gate_bias"], given["state"], rule, layout, steering, cos, cos,
                          skipped=given["skipped"], arrived=given["arrived"], check=False, **options)  # fmt: skip
    return given | {"cos": cos, "steering": steering, "reads": found[0], "addend": found[1]}


def test_the_second_launch_is_the_first_with_other_tensors(launches):
    decode()
    given = decode()
    ((programs, first, compiled),) = launches
    assert compiled.grids == [(programs, 1, 1)] and len(compiled.calls) == 1
    names = [parameter.name for parameter in heads.decode_kernel.params]
    second = dict(zip(names, compiled.calls[0], strict=True))
    assert second.keys() == first.keys()
    tensors = {name for name, value in first.items() if isinstance(value, torch.Tensor)}
    assert all(second[name] == first[name] for name in names if name not in tensors)
    expected = {
        "x_ptr": given["packed"], "s_ptr": given["state"], "bias_ptr": given["gate_bias"], "cos_ptr": given["cos"],
        "sin_ptr": given["cos"], "skipped_ptr": given["skipped"], "arrived_ptr": given["arrived"],
        "q_ptr": given["steering"].q, "o_ptr": given["steering"].o, "delta_ptr": given["addend"],
    }  # fmt: skip
    assert all(second[name] is tensor for name, tensor in expected.items())
    assert tensors == expected.keys() | {"m_ptr", "reads_ptr"}
    assert second["reads_ptr"].data_ptr() == given["reads"].data_ptr()
    assert second["m_ptr"].data_ptr() == given["packed"][:, 64:].data_ptr()


@pytest.mark.parametrize(
    "other",
    ({"batch": 3}, {"dtype": torch.float16}, {"shift": 1}, {"scale": 3.0}, {"q_rows": 64}, {"frozen": True},
     {"parts": 1}, {"mask": torch.ones(2, dtype=torch.bool)}, {"slots": torch.arange(2)}),
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_differs_is_launched_anew(launches, other):
    decode()
    decode(**other)
    assert len(launches) == 2 and not any(compiled.calls for _, _, compiled in launches)
    decode(**other)
    assert len(launches) == 2 and len(launches[1][2].calls) == 1


def test_on_amd_a_storage_past_2_gib_is_launched_anew(launches, monkeypatch):
    """Triton compiles 32-bit offsets for tensors that lie within 2 GiB there."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    decode()
    real = torch.Tensor.untyped_storage
    monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda tensor: Vast() if tensor.ndim == 4 else real(tensor))
    decode()
    decode()
    assert len(launches) == 2 and len(launches[1][2].calls) == 1


class Vast:
    def nbytes(self):
        return 2**31


def test_fusion_is_not_left_to_the_compiler(monkeypatch):
    """Which product of a sum becomes part of an fma would differ from kernel to kernel, and with it the last bits."""
    from deltamem_kernels.triton import launch

    found = []
    monkeypatch.setattr(launch, "recorded", found)
    decode()
    ((_, _, options),) = found
    assert options["enable_fp_fusion"] is False
