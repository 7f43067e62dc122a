"""The second launch of a decoded token goes past Triton's binder: same arguments, in the kernel's order."""

import inspect
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")
from deltamem_kernels.layout import HeadLayout, Steering  # noqa: E402
from deltamem_kernels.rule import DeltaRule  # noqa: E402
from deltamem_kernels.triton import decode as heads  # noqa: E402
from deltamem_kernels.triton import head_parts, replay  # noqa: E402
from deltamem_kernels.triton import heads as steering_heads  # noqa: E402
from deltamem_kernels.triton import launch as launching  # noqa: E402

KINDS_OF_DECODE = {
    "rows": heads.Rows, "memory": heads.Memory, "rule": heads.Rule, "q": head_parts.Kind, "k": head_parts.Kind,
    "v": head_parts.Kind, "o": heads.Output, "turn": head_parts.Turn, "factor": head_parts.Factor,
    "heads": head_parts.Heads, "shares": heads.Shares,
}  # fmt: skip


class Launches:
    """Stands in for ``decode_kernel``: takes down how it is launched, (programs, arguments).

    noted: the launches of calls that are noted. again: those of calls that are done again.
    """

    def __init__(self):
        names = inspect.signature(heads.decode_kernel.fn).parameters
        self.params = [SimpleNamespace(name=name, is_constexpr=False) for name in names]
        self.noted, self.again = [], []

    def __getitem__(self, grid):
        def call(num_warps, num_stages, enable_fp_fusion, **arguments):
            self.noted.append((grid[0], [arguments[p.name] for p in self.params]))
            return self

        return call


@pytest.fixture
def launches(monkeypatch):
    kernel = Launches()

    def launch_again(found):
        return lambda launched, programs, tensor, values: found.append((programs, list(values)))

    monkeypatch.setattr(replay, "_plans", {})
    monkeypatch.setattr(launching, "_launched", {})
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    monkeypatch.setattr(replay, "interpreted", lambda: False)
    monkeypatch.setattr(launching, "launch_again", launch_again(kernel.noted))
    monkeypatch.setattr(replay, "launch_again", launch_again(kernel.again))
    monkeypatch.setattr(heads, "decode_kernel", kernel)
    return kernel


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
                          skipped=given["skipped"], workspace=given["arrived"], check=False, **options)  # fmt: skip
    return given | {"cos": cos, "steering": steering, "reads": found[0], "addend": found[1]}


def by_field(kinds, values):
    """Arguments in tuples → one by one, by the names of the argument and of its field."""
    return {
        f"{name}.{field}": part
        for (name, kind), value in zip(kinds.items(), values, strict=True)
        for field, part in zip(kind._fields, value, strict=True)
    }


def test_the_second_launch_is_the_first_with_other_tensors(launches):
    decode()
    given = decode()
    ((programs, noted),), ((again_programs, again),) = launches.noted, launches.again
    assert again_programs == programs
    assert [p.name for p in launches.params] == list(KINDS_OF_DECODE)
    assert [type(value) for value in noted] == list(KINDS_OF_DECODE.values())
    first, second = by_field(KINDS_OF_DECODE, noted), by_field(KINDS_OF_DECODE, again)
    assert second.keys() == first.keys()
    tensors = {name for name, value in first.items() if isinstance(value, torch.Tensor)}
    assert all(second[name] is first[name] for name in first if name not in tensors)
    expected = {
        "rows.x_ptr": given["packed"], "memory.s_ptr": given["state"], "memory.bias_ptr": given["gate_bias"],
        "turn.cos_ptr": given["cos"], "turn.sin_ptr": given["cos"], "memory.skipped_ptr": given["skipped"],
        "rows.arrived_ptr": given["arrived"], "q.w_ptr": given["steering"].q, "o.w_ptr": given["steering"].o,
        "o.delta_ptr": given["addend"],
    }  # fmt: skip
    assert all(second[name] is tensor for name, tensor in expected.items())
    assert tensors == expected.keys() | {"memory.m_ptr", "rows.reads_ptr"}
    assert second["rows.reads_ptr"].data_ptr() == given["reads"].data_ptr()
    assert second["memory.m_ptr"].data_ptr() == given["packed"][:, 64:].data_ptr()


def test_each_argument_is_a_tuple_of_several():
    """``replay`` takes their parts all at once, which for one alone would be no tuple."""
    assert all(len(kind._fields) > 1 for kind in (*KINDS_OF_DECODE.values(), steering_heads.Rows))


@pytest.mark.parametrize(
    "other",
    ({"batch": 3}, {"dtype": torch.float16}, {"shift": 1}, {"scale": 3.0}, {"q_rows": 64}, {"frozen": True},
     {"parts": 1}, {"mask": torch.ones(2, dtype=torch.bool)}, {"slots": torch.arange(2)}),
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_differs_is_noted_anew(launches, other):
    decode()
    decode(**other)
    assert len(launches.noted) == 2 and not launches.again
    decode(**other)
    assert len(launches.noted) == 2 and len(launches.again) == 1


def test_on_amd_a_storage_past_2_gib_is_noted_anew(launches, monkeypatch):
    """Triton compiles 32-bit offsets for tensors that lie within 2 GiB there."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    decode()
    real = torch.Tensor.untyped_storage
    monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda tensor: Vast() if tensor.ndim == 4 else real(tensor))
    decode()
    decode()
    assert len(launches.noted) == 2 and len(launches.again) == 1


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


class Compiled:
    """What Triton makes of a kernel, as its launches from 3.6 to 3.9 use it; takes down what its launcher is given."""

    function, packed_metadata = 7, (1, 2)

    def __init__(self):
        self.given = []
        self._run = lambda *given: self.given.append(given)

    @property
    def run(self):
        return self._run


class Kernel:
    """A kernel that has been compiled, as Triton launches it."""

    def __init__(self, compiled, hand=lambda given: given):
        self.compiled, self.hand, self.plain = compiled, hand, []

    def __getitem__(self, grid):
        def launch(*values, **options):
            self.plain.append((values, options))
            runtime = triton.knobs.runtime
            hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
            compiled = self.compiled
            given = (*grid, 1, 1, 3, compiled.function, compiled.packed_metadata, {"name": "kernel"}, *hooks, *values)
            compiled.run(*self.hand(given))

        return launch


@pytest.fixture
def device(monkeypatch):
    """A driver whose stream is 3, and a process that has not launched yet."""
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 3)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(launching, "_launchers_known", {})


OPTIONS = {"num_warps": 1}
KINDS = (heads.Rows, int)


def again(kernel, number=5):
    """One more launch → its arguments."""
    values = [(torch.zeros(1), torch.zeros(1), None, number, 64), 8]
    launched = launching.Launched(kernel, kernel.compiled, KINDS, OPTIONS)
    launching.launch_again(launched, 2, torch.zeros(1), values)
    return values


def handed(compiled):
    """What the last launch gave the launcher: the grid, stream, function and metadata, and the arguments."""
    return compiled.given[-1][:6], compiled.given[-1][9:]


def assert_launched(kernel, values, plain):
    """That there was one launch more, the right one, made by Triton (``plain``) or past it."""
    fixed, given = handed(kernel.compiled)
    assert fixed == (2, 1, 1, 3, 7, (1, 2))
    assert len(given) == 2 and given[1] == 8
    assert all(a is b for a, b in zip(given[0], values[0], strict=True))
    assert isinstance(given[0], heads.Rows) == plain  # Triton's binder wants the named ones


def test_a_known_launcher_is_handed_the_arguments(device):
    kernel = Kernel(Compiled())
    run = kernel.compiled._run
    for turn in range(3):
        values = again(kernel, number=turn)
        assert_launched(kernel, values, plain=turn == 0)
        assert len(kernel.compiled.given) == turn + 1 and kernel.compiled._run is run
    assert len(kernel.plain) == 1 and kernel.plain[0][1] == OPTIONS
    assert launching._launchers_known == {(triton.__version__, True): True}
    other = Kernel(Compiled())  # it is asked once, not once a kernel
    assert_launched(other, again(other), plain=False)
    assert not other.plain


@pytest.mark.parametrize(
    "hand",
    (lambda given: (*given[:9], "new", *given[9:]), lambda given: (*given[:3], given[4], given[3], *given[5:]),
     lambda given: (*given[:9], *given[9], *given[10:]), lambda given: (*given[:-1], 9)),
    ids=("one more", "another order", "tuples taken apart", "another number"),
)  # fmt: skip
def test_a_changed_launcher_is_left_to_triton(device, hand):
    kernel = Kernel(Compiled(), hand)
    for turn in range(3):
        values = again(kernel, number=turn)
        assert len(kernel.plain) == len(kernel.compiled.given) == turn + 1
        named, number = kernel.plain[-1][0]
        assert isinstance(named, heads.Rows) and number == 8
        assert all(a is b for a, b in zip(named, values[0], strict=True))
    assert launching._launchers_known == {(triton.__version__, True): False}


def test_what_compiles_to_another_thing_is_left_to_triton(device):
    """A launcher that is found elsewhere, or a launch that is of another kernel: each token is written once."""

    class Elsewhere:
        function, packed_metadata = 7, (1, 2)

        def __init__(self):
            self.given = []

        def run(self, *given):
            self.given.append(given)

    kernel = Kernel(Elsewhere())
    for turn in range(3):
        again(kernel)
        assert len(kernel.plain) == len(kernel.compiled.given) == turn + 1
    launching._launchers_known.clear()
    kernel, other = Kernel(Compiled()), Compiled()
    launched = launching.Launched(kernel, other, KINDS, OPTIONS)
    for turn in range(3):
        launching.launch_again(launched, 2, torch.zeros(1), [(None, None, None, 1, 2), 8])
        assert len(kernel.plain) == len(kernel.compiled.given) == turn + 1 and not other.given


def test_another_version_is_asked_anew(device, monkeypatch):
    kernel = Kernel(Compiled())
    again(kernel), again(kernel)
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    again(kernel)
    assert len(kernel.plain) == 2 and launching._launchers_known["4.0.0", True] is True


def test_a_kernel_without_tuples_is_asked_by_itself():
    """A launcher may take tuples another way, which one without them does not show."""
    launched = launching.Launched(None, None, (int,), OPTIONS)
    assert launching._way(launched) == (triton.__version__, False)
    assert launching._way(launched._replace(kinds=KINDS)) == (triton.__version__, True)


def test_who_hooks_onto_launches_sees_them(device):
    kernel, seen = Kernel(Compiled()), []
    again(kernel), again(kernel)
    assert len(kernel.plain) == 1
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        assert_launched(kernel, again(kernel), plain=True)
    finally:
        hook.remove(seen.append)
    assert len(kernel.plain) == 2
    assert_launched(kernel, again(kernel), plain=False)


def test_a_launch_that_fails_leaves_the_launcher(device):
    compiled = Compiled()

    def run(*given):
        raise RuntimeError("no device")

    compiled._run = run
    with pytest.raises(RuntimeError, match="no device"):
        again(Kernel(compiled))
    assert compiled._run is run and not launching._launchers_known
